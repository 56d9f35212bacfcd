"""A large object of S3 as a file to write: parts of a multipart upload, which appears as a whole.

Only `Upload.complete` makes the object appear. Closing the file does not: what Python closes while
it cleans up after an error must not look like a whole object.
"""

from __future__ import annotations

import io
import uuid
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
from botocore.exceptions import ClientError

from visq.objects.ref import ObjectRef
from visq.objects.s3_calls import CallFailure, Calls, code_of, why, write_error

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef
    from typing_extensions import Buffer

log = structlog.get_logger(__name__)

PART_BYTES: Final = 8 * 1024 * 1024
"""Of every part but the last: what a writer holds in memory. S3 takes 10,000 parts: 78 GiB."""

_MARK: Final = "visq-write"


class Upload(io.RawIOBase):
    """One object that is being written. What fits into one part is put by one request instead.

    :raises ObjectForbidden: (when written or completed) the store refuses it.
    :raises Unavailable: (when written or completed) the store did not take it. If it was silent
        about the completion itself, the object may have appeared all the same.
    """

    def __init__(self, calls: Calls, ref: ObjectRef, content_type: str) -> None:
        self._calls = calls
        self._client = calls.client
        self._ref = ref
        self._content_type = content_type
        self._mark = uuid.uuid4().hex
        self._id: str | None = None
        self._parts: list[CompletedPartTypeDef] = []
        self._part = bytearray()
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Buffer) -> int:
        if self.closed:
            raise ValueError("write to a closed file")
        view = rest = memoryview(data).cast("B")
        while rest:
            room = PART_BYTES - len(self._part)
            self._part += rest[:room]
            rest = rest[room:]
            if len(self._part) == PART_BYTES:
                self._send_part()
        self._position += len(view)
        return len(view)

    def complete(self) -> None:
        """Make the object appear."""
        if self._id is None:
            self._put()
            return
        if self._part:
            self._send_part()
        try:
            self._calls.tried(partial(self._complete, self._id))
        except CallFailure as error:
            raise write_error(self._ref, error) from error

    def abort(self) -> None:
        """Make the store forget the parts; raises nothing. Idempotent."""
        if self._id is None:
            return
        abort = partial(
            self._client.abort_multipart_upload,
            Bucket=self._ref.bucket,
            Key=self._ref.key,
            UploadId=self._id,
        )
        try:
            self._calls.tried(abort)
        except CallFailure as error:
            if code_of(error) != "NoSuchUpload":
                log.warning("unfinished upload left", object=str(self._ref), error=why(error))
        self._id = None

    def _put(self) -> None:
        put = partial(
            self._client.put_object,
            Bucket=self._ref.bucket,
            Key=self._ref.key,
            Body=bytes(self._part),
            ContentType=self._content_type,
        )
        try:
            self._calls.tried_writing(self._ref.bucket, put)
        except CallFailure as error:
            raise write_error(self._ref, error) from error

    def _send_part(self) -> None:
        try:
            if self._id is None:
                self._id = self._calls.tried_writing(self._ref.bucket, self._create)
            number = len(self._parts) + 1
            send = partial(
                self._client.upload_part,
                Bucket=self._ref.bucket,
                Key=self._ref.key,
                UploadId=self._id,
                PartNumber=number,
                Body=bytes(self._part),
            )
            etag = self._calls.tried(send)["ETag"]
        except CallFailure as error:
            raise write_error(self._ref, error) from error
        self._parts.append({"ETag": etag, "PartNumber": number})
        self._part = bytearray()

    def _create(self) -> str:
        return self._client.create_multipart_upload(
            Bucket=self._ref.bucket,
            Key=self._ref.key,
            ContentType=self._content_type,
            Metadata={_MARK: self._mark},
        )["UploadId"]

    def _complete(self, upload_id: str) -> None:
        try:
            self._client.complete_multipart_upload(
                Bucket=self._ref.bucket,
                Key=self._ref.key,
                UploadId=upload_id,
                MultipartUpload={"Parts": self._parts},
            )
        except ClientError as error:
            if code_of(error) != "NoSuchUpload" or not self._is_there():
                raise

    def _is_there(self) -> bool:
        """Whether an earlier try completed it, whose answer was lost."""
        found = self._client.head_object(Bucket=self._ref.bucket, Key=self._ref.key)
        return found["Metadata"].get(_MARK) == self._mark
