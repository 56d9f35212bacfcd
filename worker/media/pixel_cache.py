"""Decoded pictures by content: one decode for all who show a picture, kept a while after them.

A content is in one of three states::

    asked for ──► being decoded ──► in use ──► unused ──► gone
                                      ▲          │
                                      └──────────┘ asked for again

Of what is unused, the longest unused goes first when it is more than `max_bytes`, and all of it
when shared memory is full. Who may see a picture was decided at its fetch, by its name.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from visq.errors import VisqError
from visq.pixels import PixelBuffer, SharedMemoryFullError

log = logging.getLogger(__name__)

Decode: TypeAlias = Callable[[bytes, str], PixelBuffer]
"""Makes pixels of encoded bytes and their SHA-256; may block."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPixels(PixelBuffer):
    """The share of one of those who use the same pixels: `release` gives back no other's."""

    give_back: Callable[[], None] = field(repr=False)

    def release(self) -> None:
        """End this use. Idempotent."""
        self.give_back()

    def __reduce__(self) -> tuple[object, ...]:
        # Only the name goes to other processes, which read it and release nothing.
        return PixelBuffer, (self.name, self.height, self.width, self.sha256)


@dataclass(slots=True)
class _Used:
    """Pixels that somebody uses, or waits for."""

    pixels: Future[PixelBuffer]
    users: set[object] = field(default_factory=set)


class PixelCache:
    """Pixels that are shared by all who ask for the same content; thread-safe."""

    def __init__(self, decode: Decode, max_bytes: int) -> None:
        """:param max_bytes: of pixels that nobody uses; 0: none are kept."""
        self._decode = decode
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._used: dict[str, _Used] = {}
        self._unused: OrderedDict[str, PixelBuffer] = OrderedDict()
        """The longest unused first."""
        self._unused_bytes = 0
        self._closed = False

    def get(self, data: bytes, sha256: str) -> SharedPixels:
        """The pixels of `data`, decoded if they are neither here nor on their way. Whoever asked
        while one decode went on shares its pixels, or its error.

        :raises VisqError: as `Decode` does; what else it raises is only the error of whom it met.
        """
        while True:
            user = object()
            used, is_first = self._join(sha256, user)
            if is_first:
                self._fill(used, data, sha256)
            try:
                return self._share(used, sha256, user)
            except _AbandonedError:
                continue

    def knows(self, sha256: str) -> bool:
        """Whether these pixels are here, or on their way."""
        return sha256 in self._used or sha256 in self._unused

    def held(self, sha256: str) -> SharedPixels | None:
        """These pixels, without their encoded bytes: if they are here, or come."""
        user = object()
        with self._lock:
            used = self._reused(sha256)
            if used is None:
                return None
            used.users.add(user)
        try:
            return self._share(used, sha256, user)
        except (VisqError, _AbandonedError):
            return None

    def close(self) -> None:
        """Free what nobody uses, and from now on all that is released."""
        with self._lock:
            self._closed = True
        self._drop_unused()

    def _join(self, sha256: str, user: object) -> tuple[_Used, bool]:
        """Be one of the users; and whether the pixels are still to be made, by this one."""
        with self._lock:
            used = self._reused(sha256)
            is_first = used is None
            if used is None:
                used = self._used[sha256] = _Used(Future())
            used.users.add(user)
            return used, is_first

    def _reused(self, sha256: str) -> _Used | None:
        """What is here of this content, in use from now on."""
        pixels = self._unused.pop(sha256, None)
        if pixels is not None:
            self._unused_bytes -= pixels.nbytes
            used = self._used[sha256] = _Used(Future())
            used.pixels.set_result(pixels)
        return self._used.get(sha256)

    def _fill(self, used: _Used, data: bytes, sha256: str) -> None:
        """Decode for all who wait."""
        try:
            pixels = self._decoded(data, sha256)
        except BaseException as error:
            with self._lock:
                del self._used[sha256]
            # What is no error of the picture's is left to whom it met; another one tries again.
            ours = isinstance(error, VisqError)
            used.pixels.set_exception(error if ours else _AbandonedError())
            raise
        used.pixels.set_result(pixels)

    def _decoded(self, data: bytes, sha256: str) -> PixelBuffer:
        while True:
            log.debug("decoding image %s", sha256)
            try:
                return self._decode(data, sha256)
            except SharedMemoryFullError:
                if not self._drop_unused():
                    raise

    def _share(self, used: _Used, sha256: str, user: object) -> SharedPixels:
        """Wait for the pixels."""
        give_back = partial(self._give_back, sha256, user)
        try:
            pixels = used.pixels.result()
        except BaseException:
            give_back()
            raise
        return SharedPixels(pixels.name, pixels.height, pixels.width, sha256, give_back)

    def _give_back(self, sha256: str, user: object) -> None:
        with self._lock:
            used = self._used.get(sha256)
            if used is None or user not in used.users:
                return  # it was given back before
            used.users.remove(user)
            if used.users:
                return
            del self._used[sha256]
            gone = self._keep(used.pixels.result())
        for pixels in gone:
            pixels.release()

    def _keep(self, pixels: PixelBuffer) -> list[PixelBuffer]:
        """Keep what nobody uses any more, if it may be kept; what must go for it."""
        if self._closed or pixels.nbytes > self._max_bytes:
            return [pixels]
        self._unused[pixels.sha256] = pixels
        self._unused_bytes += pixels.nbytes
        gone = []
        while self._unused_bytes > self._max_bytes:
            _, oldest = self._unused.popitem(last=False)
            self._unused_bytes -= oldest.nbytes
            gone.append(oldest)
        return gone

    def _drop_unused(self) -> bool:
        """Free what nobody uses; whether that was anything."""
        with self._lock:
            gone = list(self._unused.values())
            self._unused.clear()
            self._unused_bytes = 0
        for pixels in gone:
            pixels.release()
        return bool(gone)


class _AbandonedError(Exception):
    """Who was to decode for all has met something of its own."""
