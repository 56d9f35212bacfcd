"""How the S3 store calls its server: one client, one loop of tries, and what failures mean.

There is one loop of tries, and one limit of time over all of them (boto3's own tries are switched
off: they would multiply with these).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)
from urllib3.exceptions import HTTPError

from visq.errors import (
    ConfigurationError,
    ObjectChanged,
    ObjectForbidden,
    ObjectNotFound,
    Unavailable,
    VisqError,
)
from visq.objects.overdue import Limit, bound
from visq.objects.ref import ObjectRef
from visq.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.literals import BucketLocationConstraintType

_CONNECT_SECONDS: Final = 5.0
_TRIES: Final = 4
_BACKOFF_SECONDS: Final = 0.5
"""Longest wait before the second try; doubles with each further one."""
_DEFAULT_REGION: Final = "us-east-1"

# 405: a delete marker was named by its version. 400 InvalidArgument: no such versionId (400 alone
# is all that a HEAD says of it).
_MISSING: Final = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404", "405", "MethodNotAllowed"}
_NO_VERSION: Final = {"InvalidArgument", "400"}
_PASSING: Final = {"SlowDown", "RequestTimeout", "Throttling", "TooManyRequests"}
"""Error codes that another try may not meet, beside those of status 429 and 5xx."""

T = TypeVar("T")


class OverdueError(Exception):
    """The time for a call has passed; says what the last try met."""


ServerFailure = (BotoCoreError, ClientError, HTTPError)
"""What boto3 raises; urllib3's own, where the body of an answer breaks in TLS."""
CallFailure = (*ServerFailure, OverdueError)
"""What a call raises after all its tries."""


class Calls:
    """The client of one store, and how it is used."""

    def __init__(self, settings: Settings) -> None:
        self.client = connect(settings, settings.fetch_timeout_seconds)
        self.seconds: Final = settings.fetch_total_seconds
        self._upload_bucket = settings.upload_bucket

    def tried(self, call: Callable[[], T]) -> T:
        """Do `call`, and again with back-off if it meets what may pass, while there is time.

        :raises OverdueError: the time has passed.
        """
        with Limit(self.seconds) as limit:
            for number in range(_TRIES):
                try:
                    return call()
                except ServerFailure as error:
                    if not _may_pass(error):
                        raise
                    failure = error
                wait = random.random() * _BACKOFF_SECONDS * 2**number
                if number == _TRIES - 1 or not limit.pause(wait):
                    break
            if limit.passed:
                raise OverdueError(why(failure)) from failure
            raise failure

    def tried_writing(self, bucket: str, call: Callable[[], T]) -> T:
        """As `tried`; makes the upload bucket if that is what is missing."""
        try:
            return self.tried(call)
        except ClientError as error:
            if code_of(error) != "NoSuchBucket" or bucket != self._upload_bucket:
                raise
        self.tried(lambda: self._create_bucket(bucket))
        return self.tried(call)

    def _create_bucket(self, bucket: str) -> None:
        region = self.client.meta.region_name
        try:
            if region == _DEFAULT_REGION:  # S3 refuses to hear its default named
                self.client.create_bucket(Bucket=bucket)
            else:
                place: BucketLocationConstraintType = region  # type: ignore[assignment]
                self.client.create_bucket(
                    Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": place}
                )
        except ClientError as error:
            if code_of(error) != "BucketAlreadyOwnedByYou":  # another process was faster
                raise


def connect(settings: Settings, read_seconds: float) -> S3Client:
    """:raises ConfigurationError: the settings do not make a client."""
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    if (key is None) != (secret is None):
        raise ConfigurationError(
            "set both VISQ_S3_ACCESS_KEY_ID and VISQ_S3_SECRET_ACCESS_KEY, or none of them"
        )
    config = Config(
        signature_version="s3v4",
        connect_timeout=min(_CONNECT_SECONDS, read_seconds),
        read_timeout=read_seconds,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=settings.fetch_concurrency,
        # Stores on one host have no name for each bucket, and some do not know newer checksums.
        s3={"addressing_style": "path" if settings.s3_endpoint_url else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = boto3.Session(
        aws_access_key_id=key.get_secret_value() if key else None,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        region_name=settings.s3_region,
    )
    try:
        client = session.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=session.region_name or _DEFAULT_REGION,
            config=config,
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigurationError(
            "VISQ_S3_ENDPOINT_URL or VISQ_S3_REGION do not name an S3 endpoint"
        ) from error
    return bound(client)


def object_error(ref: ObjectRef, error: Exception, doing: str) -> VisqError:
    """What a failed call for `ref` means; `doing` ends "could not be ..."."""
    if is_missing(ref, error):
        return ObjectNotFound(f"{ref} is not found")
    if status_of(error) == 412:
        return ObjectChanged(f"{ref} has changed since it was opened")
    if status_of(error) in (401, 403):
        return ObjectForbidden(f"the object store refuses {ref} ({code_of(error)})")
    return Unavailable(f"{ref} could not be {doing} ({why(error)})")


def write_error(ref: ObjectRef, error: Exception) -> VisqError:
    """What a failed write of `ref` means."""
    if status_of(error) in (401, 403):
        return ObjectForbidden(f"the object store refuses to write {ref}")
    return Unavailable(f"the object store did not take {ref} ({why(error)})")


def list_error(bucket: str, error: Exception) -> VisqError:
    """What a failed listing of `bucket` means."""
    if code_of(error) in _MISSING or status_of(error) == 404:
        return ObjectNotFound(f"bucket `{bucket}` is not found")
    if status_of(error) in (401, 403):
        return ObjectForbidden(f"the object store refuses to list bucket `{bucket}`")
    return Unavailable(f"bucket `{bucket}` could not be listed ({why(error)})")


def is_missing(ref: ObjectRef, error: Exception) -> bool:
    """Whether a failed call says that there is no such bucket, key or version."""
    code = code_of(error)
    if code in _MISSING or status_of(error) in (404, 405):
        return True
    return ref.version_id is not None and code in _NO_VERSION


def status_of(error: Exception) -> int:
    """Of the answer; 0: there was none."""
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: Exception) -> str:
    """S3's error code; only if it looks like one, as it comes from outside. Empty: no answer."""
    if not isinstance(error, ClientError):
        return ""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if re.fullmatch(r"\w{1,64}", code) else "unknown error"


def why(error: Exception) -> str:
    """What may be told of an error: others' texts can hold addresses and more."""
    if isinstance(error, OverdueError):
        return str(error)
    return code_of(error) or type(error).__name__


def _may_pass(error: Exception) -> bool:
    """Whether another try may not meet it."""
    if isinstance(error, ClientError):
        return status_of(error) == 429 or status_of(error) >= 500 or code_of(error) in _PASSING
    return isinstance(
        error, HTTPClientError | IncompleteReadError | FlexibleChecksumError | HTTPError
    )
