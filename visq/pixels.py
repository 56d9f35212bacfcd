"""Decoded pictures in shared memory: made by media processes, read by the engine's process.

A `PixelBuffer` is a small value that names the memory, so it goes through any queue. Whoever took
charge of it calls `release`; arrays that are still held stay valid after that.

Why not `multiprocessing.shared_memory.SharedMemory`: before Python 3.13 every process that
attaches enters the name into the resource tracker again, and its `create` does not reserve the
memory, so a full ``/dev/shm`` kills the process that writes to it (SIGBUS). Here the name is
entered once, by the process that makes it up, before the memory exists, and withdrawn by `release`.
The tracker is one process for a worker and all the children that it spawns; it outlives them and
removes what they left behind, even after ``kill -9``.
"""

from __future__ import annotations

import _posixshmem  # type: ignore[import-not-found]  # what multiprocessing.shared_memory is made of
import errno
import mmap
import os
import secrets
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from visq.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

NAME_PREFIX: Final = "/visq-"
"""All names begin with this and the worker's process id; they are files in ``/dev/shm``."""

SHARED_MEMORY: Final = Path("/dev/shm")
"""Where it is a folder."""

_CHANNELS: Final = 3


class SharedMemoryFullError(Unavailable):
    """There is no room for a picture."""


@dataclass(frozen=True, slots=True)
class PixelBuffer:
    """An RGB picture: uint8, (height, width, 3), row by row."""

    name: str
    height: int
    width: int
    sha256: str
    """SHA-256, hexadecimal, of the encoded bytes that were fetched (not of the pixels)."""

    @property
    def nbytes(self) -> int:
        """What it takes of shared memory: whole pages."""
        pages = -(-self.height * self.width * _CHANNELS // mmap.PAGESIZE)
        return pages * mmap.PAGESIZE

    @classmethod
    def create(cls, array: NDArray[np.uint8], sha256: str) -> PixelBuffer:
        """Copy `array` into new shared memory.

        :raises SharedMemoryFullError: if there is no room for it.
        """
        with reserved_name() as name:
            write_pixels(name, array)
        return cls(name, array.shape[0], array.shape[1], sha256)

    def array(self) -> NDArray[np.uint8]:
        """The picture as a read-only view of the shared memory, valid as long as it is held.

        :raises Unavailable: if it was released.
        """
        try:
            fd = _posixshmem.shm_open(self.name, os.O_RDONLY, mode=0)
        except FileNotFoundError:
            raise Unavailable("the pixels of this image were released") from None
        try:
            shape = (self.height, self.width, _CHANNELS)
            memory = mmap.mmap(fd, int(np.prod(shape)), prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        return np.frombuffer(memory, dtype=np.uint8).reshape(shape)

    def release(self) -> None:
        """Give the memory back. Idempotent, and any process may do it."""
        try:
            _posixshmem.shm_unlink(self.name)
        except FileNotFoundError:
            return
        resource_tracker.unregister(self.name, "shared_memory")


@contextmanager
def reserved_name() -> Iterator[str]:
    """A new name for `write_pixels`, known to the resource tracker.

    If the block raises, whatever was written under the name is removed.
    """
    name = f"{NAME_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    resource_tracker.register(name, "shared_memory")
    try:
        yield name
    except BaseException:
        with suppress(FileNotFoundError):  # it may not be written yet
            _posixshmem.shm_unlink(name)
        resource_tracker.unregister(name, "shared_memory")
        raise


def write_pixels(name: str, array: NDArray[np.uint8]) -> None:
    """Write a picture, (height, width, 3) of uint8, under a name reserved by `reserved_name`.

    :raises SharedMemoryFullError: if there is no room for it.
    :raises MemoryError: if this process may not use so much.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != _CHANNELS or not array.size:
        raise ValueError(f"not an RGB picture of uint8: {array.dtype} {array.shape}")
    fd = _posixshmem.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
    try:
        os.posix_fallocate(fd, 0, array.nbytes)
        with mmap.mmap(fd, array.nbytes) as memory:
            view = np.frombuffer(memory, dtype=np.uint8).reshape(array.shape)
            np.copyto(view, array)
            del view  # else the mapping cannot be closed
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        if error.errno == errno.ENOSPC:
            raise SharedMemoryFullError(
                "shared memory is full: give the worker a larger /dev/shm (containers have 64 MB "
                "by default) or a smaller VISQ_CONCURRENCY"
            ) from error
        raise
    finally:
        os.close(fd)
