"""S3 and whatever speaks its API, by boto3: one client, whose connections all threads share.

boto3's `get_object` was chosen over signed URLs: `docs/decisions/004-reading-objects.md`.

An object is always read whole, by one request: what breaks off is read again from its beginning,
so that two versions of an object never mix. There is one loop of tries, and one limit of time over
all of them (boto3's own tries are switched off: they would multiply with these).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

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
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    Unavailable,
    VisqError,
)
from visq.objects.overdue import Limit, bound
from visq.objects.ref import ObjectRef
from visq.objects.store import FetchedObject, NotModified
from visq.settings import Settings

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.literals import BucketLocationConstraintType
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef

_CONNECT_SECONDS: Final = 5.0
_TRIES: Final = 4
_BACKOFF_SECONDS: Final = 0.5
"""Longest wait before the second try; doubles with each further one."""
_PING_SECONDS: Final = 3.0
_CHUNK: Final = 1024 * 1024
_DEFAULT_REGION: Final = "us-east-1"

# 405: a delete marker was named by its version. 400 InvalidArgument: no such versionId.
_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404", "405", "MethodNotAllowed"}
_PASSING: Final = {"SlowDown", "RequestTimeout", "Throttling", "TooManyRequests"}
"""Error codes that another try may not meet, beside those of status 429 and 5xx."""

_Failure = (BotoCoreError, ClientError, HTTPError)
"""What boto3 raises; urllib3's own, where the body of an answer breaks in TLS."""

T = TypeVar("T")


class S3Store:
    """The store of ``s3_endpoint_url``, or AWS.

    :raises ConfigurationError: if the settings do not make a client.
    """

    remote: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        self._upload_bucket = settings.upload_bucket
        self._seconds = settings.fetch_total_seconds
        self._client = _client(settings, settings.fetch_timeout_seconds)
        self._ping_client = _client(settings, _PING_SECONDS)

    def get(
        self, ref: ObjectRef, *, max_bytes: int, if_none_match: str | None = None
    ) -> FetchedObject | NotModified:
        try:
            return self._tried(lambda: self._get(ref, max_bytes, if_none_match))
        except _Failure as error:
            if _status(error) == 304:
                return NotModified()
            raise _read_error(ref, error) from error
        except _OverdueError as error:
            raise ImageFetchFailed(
                f"image {ref} could not be fetched in {self._seconds:g} s ({error})"
            ) from error

    def put(self, ref: ObjectRef, data: bytes, content_type: str) -> None:
        try:
            try:
                self._tried(lambda: self._put(ref, data, content_type))
            except ClientError as error:
                if _code(error) != "NoSuchBucket" or ref.bucket != self._upload_bucket:
                    raise
                self._tried(lambda: self._create_bucket(ref.bucket))
                self._tried(lambda: self._put(ref, data, content_type))
        except (*_Failure, _OverdueError) as error:
            if _status(error) in (401, 403):
                raise ImageForbidden(f"the object store refuses to write {ref}") from error
            raise Unavailable(f"the object store did not take {ref} ({_why(error)})") from error

    def ping(self) -> None:
        try:
            with Limit(_PING_SECONDS):
                self._ping_client.head_bucket(Bucket=self._upload_bucket)
        except ClientError as error:
            if _status(error) == 404:
                return  # the first upload makes the bucket
            raise Unavailable(
                f"the object store refuses bucket `{self._upload_bucket}` ({_code(error)})"
            ) from error
        except _Failure as error:
            raise Unavailable(f"the object store does not answer ({_why(error)})") from error

    def close(self) -> None:
        self._client.close()
        self._ping_client.close()

    def _tried(self, call: Callable[[], T]) -> T:
        """Do `call`, and again with back-off if it meets what may pass, while there is time.

        :raises _OverdueError: the time has passed.
        """
        with Limit(self._seconds) as limit:
            for number in range(_TRIES):
                try:
                    return call()
                except _Failure as error:
                    if not _may_pass(error):
                        raise
                    failure = error
                wait = random.random() * _BACKOFF_SECONDS * 2**number
                if number == _TRIES - 1 or not limit.pause(wait):
                    break
            if limit.passed:
                raise _OverdueError(_why(failure)) from failure
            raise failure

    def _get(self, ref: ObjectRef, max_bytes: int, if_none_match: str | None) -> FetchedObject:
        # (If the store knows a checksum of the object, boto3 compares it with the body.)
        request: GetObjectRequestTypeDef = {
            "Bucket": ref.bucket,
            "Key": ref.key,
            "ChecksumMode": "ENABLED",
        }
        if ref.version_id is not None:
            request["VersionId"] = ref.version_id
        if if_none_match is not None:
            request["IfNoneMatch"] = if_none_match
        answer = self._client.get_object(**request)
        body = answer["Body"]
        try:
            if answer.get("ContentLength", 0) > max_bytes:
                raise _too_large(ref, max_bytes)
            return FetchedObject(_read(ref, body, max_bytes), answer.get("ETag"))
        finally:
            body.close()

    def _put(self, ref: ObjectRef, data: bytes, content_type: str) -> None:
        self._client.put_object(Bucket=ref.bucket, Key=ref.key, Body=data, ContentType=content_type)

    def _create_bucket(self, bucket: str) -> None:
        region = self._client.meta.region_name
        try:
            if region == _DEFAULT_REGION:  # S3 refuses to hear its default named
                self._client.create_bucket(Bucket=bucket)
            else:
                place: BucketLocationConstraintType = region  # type: ignore[assignment]
                self._client.create_bucket(
                    Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": place}
                )
        except ClientError as error:
            if _code(error) != "BucketAlreadyOwnedByYou":  # another process was faster
                raise


def _client(settings: Settings, read_seconds: float) -> S3Client:
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


class _OverdueError(Exception):
    """The time for a call has passed; says what the last try met."""


def _may_pass(error: Exception) -> bool:
    """Whether another try may not meet it."""
    if isinstance(error, ClientError):
        return _status(error) == 429 or _status(error) >= 500 or _code(error) in _PASSING
    return isinstance(
        error, HTTPClientError | IncompleteReadError | FlexibleChecksumError | HTTPError
    )


def _read(ref: ObjectRef, body: StreamingBody, max_bytes: int) -> bytes:
    """The whole body. The last, empty read compares it with the announced length."""
    data = bytearray()
    while chunk := body.read(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise _too_large(ref, max_bytes)
    return bytes(data)


def _read_error(ref: ObjectRef, error: Exception) -> VisqError:
    code, status = _code(error), _status(error)
    if code in _MISSING or status in (404, 405) or (ref.version_id and code == "InvalidArgument"):
        return ImageNotFound(f"image {ref} is not found")
    if status in (401, 403):
        return ImageForbidden(f"image {ref} is refused by the object store ({code})")
    return ImageFetchFailed(f"image {ref} could not be fetched ({_why(error)})")


def _too_large(ref: ObjectRef, max_bytes: int) -> ImageTooLarge:
    return ImageTooLarge(f"image {ref} has more than {max_bytes} bytes")


def _status(error: Exception) -> int:
    """Of the answer; 0: there was none."""
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    """S3's error code; only if it looks like one, as it comes from outside. Empty: no answer."""
    if not isinstance(error, ClientError):
        return ""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if re.fullmatch(r"\w{1,64}", code) else "unknown error"


def _why(error: Exception) -> str:
    """What may be told of an error: others' texts can hold addresses and more."""
    if isinstance(error, _OverdueError):
        return str(error)
    return _code(error) or type(error).__name__
