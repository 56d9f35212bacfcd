"""Large objects of the folder store as files to read and to write.

What the disk says (it is full, it is gone) becomes errors of visq here, where the file is used:
around the caller's block, the caller's own `OSError` could not be told from these.
"""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from visq.errors import ObjectChanged, Unavailable
from visq.objects.ref import ObjectRef

if TYPE_CHECKING:
    from typing_extensions import Buffer


class OutgoingFile(io.FileIO):
    """The raw file below the reader of an object; it owns `descriptor`.

    :raises ObjectChanged: (when read) somebody cut the file off in place.
    :raises Unavailable: (when read) the disk fails.
    """

    def __init__(self, ref: ObjectRef, descriptor: int) -> None:
        super().__init__(descriptor, "rb")
        self._ref = ref
        self._size = os.fstat(descriptor).st_size

    def readinto(self, buffer: Buffer) -> int:
        try:
            count = super().readinto(buffer) or 0
        except OSError as error:
            raise Unavailable(f"{self._ref} could not be read ({os_error_name(error)})") from error
        if count == 0 and memoryview(buffer).nbytes and self.tell() < self._size:
            raise ObjectChanged(f"{self._ref} has become shorter since it was opened")
        return count

    # FileIO's own do not come by `readinto`.

    def read(self, size: int | None = -1, /) -> bytes:
        return io.RawIOBase.read(self, -1 if size is None else size) or b""

    def readall(self) -> bytes:
        return io.RawIOBase.readall(self)


class IncomingFile(io.FileIO):
    """The raw file below the writer of an object: a new one, at `path`.

    :raises Unavailable: (when written) the disk is full or fails.
    """

    def __init__(self, ref: ObjectRef, path: Path) -> None:
        super().__init__(path, "xb")
        self._ref = ref

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise Unavailable(
                f"{self._ref} could not be written ({os_error_name(error)})"
            ) from error


def os_error_name(error: OSError) -> str:
    """Its symbol, such as ``ENOSPC``: messages of the system name paths."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)
