"""The bytes of files, on their way into the object store and out of it: never whole in memory, and
never on the event loop.

Threads of Starlette's pool move them: a store that hangs must not hold those of
`asyncio.to_thread`, which the rest of the API uses.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import BinaryIO, Final

from starlette.concurrency import run_in_threadpool

from visq.objects import ObjectRef, ObjectStore

_PIECE: Final = 1024 * 1024
"""Bytes that change threads at a time."""


class StoreWriter:
    """One object that is written (``async with``), with the errors of `ObjectStore.write`."""

    def __init__(self, store: ObjectStore, ref: ObjectRef, content_type: str) -> None:
        self._writing: AbstractContextManager[BinaryIO] = store.write(ref, content_type)
        self._file: BinaryIO
        self._pending = bytearray()
        self._lock = threading.Lock()
        """A request may be cancelled while a thread still writes for it."""

    async def write(self, data: bytes) -> None:
        self._pending += data
        if len(self._pending) >= _PIECE:
            await self._flush()

    async def __aenter__(self) -> StoreWriter:
        self._file = await run_in_threadpool(self._writing.__enter__)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                await self._flush()
            except BaseException as failure:
                await self._end(failure)
                raise
        await self._end(error)

    async def _flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        await run_in_threadpool(self._write, pending)

    async def _end(self, error: BaseException | None) -> None:
        await run_in_threadpool(self._exit, error)

    def _write(self, data: bytearray) -> None:
        with self._lock:
            self._file.write(data)

    def _exit(self, error: BaseException | None) -> None:
        with self._lock:
            trace = None if error is None else error.__traceback__
            self._writing.__exit__(None if error is None else type(error), error, trace)


async def open_object(store: ObjectStore, ref: ObjectRef) -> tuple[int, AsyncIterator[bytes]]:
    """The size of an object, and its bytes in pieces.

    :raises ObjectNotFound, ObjectForbidden, Unavailable: here, or while the pieces are read.
    """
    file = await run_in_threadpool(store.open, ref)
    size = await run_in_threadpool(file.seek, 0, io.SEEK_END)
    return size, _pieces(file)


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    try:
        await run_in_threadpool(file.seek, 0)
        while piece := await run_in_threadpool(file.read, _PIECE):
            yield piece
    finally:
        # Not awaited: it waits for a thread that still reads, and whoever asked may be gone.
        asyncio.get_running_loop().run_in_executor(None, file.close)
