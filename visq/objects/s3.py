"""S3 and whatever speaks its API, by boto3: one client, whose connections all threads share.

boto3's `get_object` was chosen over signed URLs: `docs/decisions/004-reading-objects.md`.

An image is always read whole, by one request: what breaks off is read again from its beginning,
so that two versions of an object never mix. Large objects are read and written in pieces:
`s3_reading`, `s3_writing`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Final, cast

from botocore.exceptions import ClientError

from visq.errors import (
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    ObjectChanged,
    Unavailable,
    VisqError,
)
from visq.objects.overdue import Limit
from visq.objects.ref import ObjectRef, check_listing
from visq.objects.s3_calls import (
    CallFailure,
    Calls,
    OverdueError,
    ServerFailure,
    code_of,
    connect,
    is_missing,
    list_error,
    object_error,
    status_of,
    why,
)
from visq.objects.s3_reading import READ_BYTES, RangeReader
from visq.objects.s3_writing import Upload
from visq.objects.store import FetchedObject, ListedObject, NotModified, ObjectInfo
from visq.settings import Settings

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3.type_defs import (
        DeleteObjectRequestTypeDef,
        GetObjectRequestTypeDef,
        HeadObjectRequestTypeDef,
        ListObjectsV2RequestTypeDef,
    )

_PING_SECONDS: Final = 3.0
_CHUNK: Final = 1024 * 1024
_PAGE_KEYS: Final = 1000
"""S3's own limit."""


class S3Store:
    """The store of ``s3_endpoint_url``, or AWS.

    :raises ConfigurationError: if the settings do not make a client.
    """

    remote: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        self._upload_bucket = settings.upload_bucket
        self._calls = Calls(settings)
        self._client = self._calls.client
        self._ping_client = connect(settings, _PING_SECONDS)

    def get(
        self, ref: ObjectRef, *, max_bytes: int, if_none_match: str | None = None
    ) -> FetchedObject | NotModified:
        try:
            return self._calls.tried(lambda: self._get(ref, max_bytes, if_none_match))
        except ServerFailure as error:
            if status_of(error) == 304:
                return NotModified()
            raise _read_error(ref, error) from error
        except OverdueError as error:
            raise ImageFetchFailed(
                f"image {ref} could not be fetched in {self._calls.seconds:g} s ({error})"
            ) from error

    def put(self, ref: ObjectRef, data: bytes, content_type: str) -> None:
        put = partial(
            self._client.put_object,
            Bucket=ref.bucket,
            Key=ref.key,
            Body=data,
            ContentType=content_type,
        )
        try:
            self._calls.tried_writing(ref.bucket, put)
        except CallFailure as error:
            if status_of(error) in (401, 403):
                raise ImageForbidden(f"the object store refuses to write {ref}") from error
            raise Unavailable(f"the object store did not take {ref} ({why(error)})") from error

    def open(self, ref: ObjectRef, *, if_match: str | None = None) -> BinaryIO:
        info = self.stat(ref)
        if if_match is not None and info.etag != if_match:
            raise ObjectChanged(f"{ref} has changed")
        return io.BufferedReader(RangeReader(self._calls, ref, info), READ_BYTES)

    @contextmanager
    def write(self, ref: ObjectRef, content_type: str) -> Iterator[BinaryIO]:
        upload = Upload(self._calls, ref, content_type)
        try:
            yield cast("BinaryIO", upload)
            upload.complete()
        except BaseException:
            upload.abort()
            raise

    def list(self, bucket: str, prefix: str, *, after: str | None = None) -> Iterator[ListedObject]:
        check_listing(bucket, prefix, after or "")
        more = True
        while more:
            request: ListObjectsV2RequestTypeDef = {
                "Bucket": bucket,
                "Prefix": prefix,
                "MaxKeys": _PAGE_KEYS,
            }
            if after:
                # Not a continuation token: those run out while a reader is slow.
                request["StartAfter"] = after
            try:
                page = self._calls.tried(partial(self._client.list_objects_v2, **request))
            except CallFailure as error:
                raise list_error(bucket, error) from error
            found = page.get("Contents", [])
            more = page.get("IsTruncated", False)
            if more and not found:
                raise Unavailable(f"the object store lists bucket `{bucket}` without an end")
            for entry in found:
                after = entry["Key"]
                yield ListedObject(after, entry["Size"])

    def delete(self, ref: ObjectRef) -> None:
        request: DeleteObjectRequestTypeDef = {"Bucket": ref.bucket, "Key": ref.key}
        if ref.version_id is not None:
            request["VersionId"] = ref.version_id
        try:
            self._calls.tried(partial(self._client.delete_object, **request))
        except CallFailure as error:
            if not is_missing(ref, error):
                raise object_error(ref, error, "deleted") from error

    def stat(self, ref: ObjectRef) -> ObjectInfo:
        request: HeadObjectRequestTypeDef = {"Bucket": ref.bucket, "Key": ref.key}
        if ref.version_id is not None:
            request["VersionId"] = ref.version_id
        try:
            answer = self._calls.tried(partial(self._client.head_object, **request))
        except CallFailure as error:
            raise object_error(ref, error, "read") from error
        return ObjectInfo(answer["ContentLength"], answer.get("ETag"))

    def ping(self) -> None:
        try:
            with Limit(_PING_SECONDS):
                self._ping_client.head_bucket(Bucket=self._upload_bucket)
        except ClientError as error:
            if status_of(error) == 404:
                return  # the first upload makes the bucket
            raise Unavailable(
                f"the object store refuses bucket `{self._upload_bucket}` ({code_of(error)})"
            ) from error
        except ServerFailure as error:
            raise Unavailable(f"the object store does not answer ({why(error)})") from error

    def close(self) -> None:
        self._client.close()
        self._ping_client.close()

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


def _read(ref: ObjectRef, body: StreamingBody, max_bytes: int) -> bytes:
    """The whole body. The last, empty read compares it with the announced length."""
    data = bytearray()
    while chunk := body.read(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise _too_large(ref, max_bytes)
    return bytes(data)


def _read_error(ref: ObjectRef, error: Exception) -> VisqError:
    if is_missing(ref, error):
        return ImageNotFound(f"image {ref} is not found")
    if status_of(error) in (401, 403):
        return ImageForbidden(f"image {ref} is refused by the object store ({code_of(error)})")
    return ImageFetchFailed(f"image {ref} could not be fetched ({why(error)})")


def _too_large(ref: ObjectRef, max_bytes: int) -> ImageTooLarge:
    return ImageTooLarge(f"image {ref} has more than {max_bytes} bytes")
