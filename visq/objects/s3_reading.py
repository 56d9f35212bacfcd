"""A large object of S3 as a file to read: in ranges, each by a request of its own.

Between two ranges no connection is held, so a reader may take hours over a file; a range that
breaks off is asked for again, within the store's limit of time; and every range is of the version
that was there at the beginning (``If-Match``). docs/decisions/012-large-objects.md says why this is
not smart_open.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

from visq.errors import Unavailable
from visq.objects.ref import ObjectRef
from visq.objects.s3_calls import CallFailure, Calls, object_error
from visq.objects.store import ObjectInfo

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef
    from typing_extensions import Buffer

READ_BYTES: Final = 4 * 1024 * 1024
"""Most bytes of one request: what a reader holds in memory."""


class RangeReader(io.RawIOBase):
    """The raw file below a `BufferedReader`.

    :raises ObjectChanged: (when read) the object is another one now.
    :raises ObjectNotFound, ObjectForbidden: (when read) it is gone, or refused now.
    :raises Unavailable: (when read) the store does not answer. It never ends early.
    """

    def __init__(self, calls: Calls, ref: ObjectRef, info: ObjectInfo) -> None:
        self._calls = calls
        self._ref = ref
        self._info = info
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        if start + offset < 0:
            raise ValueError("a position before the beginning of the object")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        size = min(len(view), READ_BYTES, self._info.size - self._position)
        if size <= 0:
            return 0
        try:
            data = self._calls.tried(lambda: self._range(size))
        except CallFailure as error:
            raise object_error(self._ref, error, "read") from error
        view[:size] = data
        self._position += size
        return size

    def readall(self) -> bytes:
        # RawIOBase's own asks for 8 KiB at a time.
        return b"".join(iter(lambda: self.read(READ_BYTES) or b"", b""))

    def _range(self, size: int) -> bytes:
        request: GetObjectRequestTypeDef = {
            "Bucket": self._ref.bucket,
            "Key": self._ref.key,
            "Range": f"bytes={self._position}-{self._position + size - 1}",
        }
        if self._ref.version_id is not None:
            request["VersionId"] = self._ref.version_id
        if self._info.etag is not None:
            request["IfMatch"] = self._info.etag
        answer = self._calls.client.get_object(**request)
        body = answer["Body"]
        try:
            if answer["ContentLength"] != size:  # it does not know ranges
                raise Unavailable(f"the object store sends another part of {self._ref} than asked")
            return body.read()  # compares itself with the announced length
        finally:
            body.close()
