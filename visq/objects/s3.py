"""S3 and whatever speaks its API, by boto3: one client, whose connections all threads share.

boto3's `get_object` was chosen over signed URLs: `docs/decisions/004-reading-objects.md`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from visq.errors import (
    ConfigurationError,
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    Unavailable,
    VisqError,
)
from visq.objects.ref import ObjectRef
from visq.objects.store import FetchedObject, NotModified
from visq.settings import Settings

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.literals import BucketLocationConstraintType
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef

_CONNECT_SECONDS: Final = 5.0
_REQUEST_ATTEMPTS: Final = 4
"""Attempts that boto3 makes, with back-off, until the answer begins."""
_BODY_ATTEMPTS: Final = 2
"""boto3 does not repeat a read that breaks in the middle of the body."""
_PING_SECONDS: Final = 3.0
_CHUNK: Final = 1024 * 1024
_DEFAULT_REGION: Final = "us-east-1"

# 405: a delete marker was named by its version. 400 InvalidArgument: no such versionId.
_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404", "405", "MethodNotAllowed"}


class S3Store:
    """The store of ``s3_endpoint_url``, or AWS.

    :raises ConfigurationError: if the settings do not make a client.
    """

    remote: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        self._upload_bucket = settings.upload_bucket
        self._client = _client(settings, settings.fetch_timeout_seconds, attempts=_REQUEST_ATTEMPTS)
        self._ping_client = _client(settings, _PING_SECONDS, attempts=1)

    def get(
        self, ref: ObjectRef, *, max_bytes: int, if_none_match: str | None = None
    ) -> FetchedObject | NotModified:
        for attempt in range(1, _BODY_ATTEMPTS + 1):
            try:
                return self._get(ref, max_bytes, if_none_match)
            except ClientError as error:
                if _status(error) == 304:
                    return NotModified()
                raise _read_error(ref, error) from error
            except BotoCoreError as error:
                if attempt == _BODY_ATTEMPTS:
                    raise ImageFetchFailed(
                        f"image {ref} could not be fetched ({type(error).__name__})"
                    ) from error
        raise AssertionError("unreachable")

    def put(self, ref: ObjectRef, data: bytes, content_type: str) -> None:
        try:
            try:
                self._put(ref, data, content_type)
            except ClientError as error:
                if _code(error) != "NoSuchBucket" or ref.bucket != self._upload_bucket:
                    raise
                self._create_bucket(ref.bucket)
                self._put(ref, data, content_type)
        except ClientError as error:
            if _status(error) in (401, 403):
                raise ImageForbidden(f"the object store refuses to write {ref}") from error
            raise Unavailable(f"the object store did not take {ref} ({_code(error)})") from error
        except BotoCoreError as error:
            raise Unavailable(
                f"the object store did not take {ref} ({type(error).__name__})"
            ) from error

    def ping(self) -> None:
        try:
            self._ping_client.head_bucket(Bucket=self._upload_bucket)
        except ClientError as error:
            if _status(error) == 404:
                return  # the first upload makes the bucket
            raise Unavailable(
                f"the object store refuses bucket `{self._upload_bucket}` ({_code(error)})"
            ) from error
        except BotoCoreError as error:
            raise Unavailable(
                f"the object store does not answer ({type(error).__name__})"
            ) from error

    def close(self) -> None:
        self._client.close()
        self._ping_client.close()

    def _get(self, ref: ObjectRef, max_bytes: int, if_none_match: str | None) -> FetchedObject:
        request: GetObjectRequestTypeDef = {"Bucket": ref.bucket, "Key": ref.key}
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


def _client(settings: Settings, read_seconds: float, *, attempts: int) -> S3Client:
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    if (key is None) != (secret is None):
        raise ConfigurationError(
            "set both VISQ_S3_ACCESS_KEY_ID and VISQ_S3_SECRET_ACCESS_KEY, or none of them"
        )
    config = Config(
        signature_version="s3v4",
        connect_timeout=min(_CONNECT_SECONDS, read_seconds),
        read_timeout=read_seconds,
        retries={"mode": "standard", "total_max_attempts": attempts},
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
        return session.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=session.region_name or _DEFAULT_REGION,
            config=config,
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigurationError(
            "VISQ_S3_ENDPOINT_URL or VISQ_S3_REGION do not name an S3 endpoint"
        ) from error


def _read(ref: ObjectRef, body: StreamingBody, max_bytes: int) -> bytes:
    """The whole body. The last, empty read compares it with the announced length."""
    data = bytearray()
    while chunk := body.read(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise _too_large(ref, max_bytes)
    return bytes(data)


def _read_error(ref: ObjectRef, error: ClientError) -> VisqError:
    code, status = _code(error), _status(error)
    if code in _MISSING or status in (404, 405) or (ref.version_id and code == "InvalidArgument"):
        return ImageNotFound(f"image {ref} is not found")
    if status in (401, 403):
        return ImageForbidden(f"image {ref} is refused by the object store ({code})")
    return ImageFetchFailed(f"image {ref} could not be fetched ({code})")


def _too_large(ref: ObjectRef, max_bytes: int) -> ImageTooLarge:
    return ImageTooLarge(f"image {ref} has more than {max_bytes} bytes")


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: ClientError) -> str:
    """S3's error code; only if it looks like one, as it comes from outside."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if re.fullmatch(r"\w{1,64}", code) else "unknown error"
