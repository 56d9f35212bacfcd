"""The media processes: each decodes one picture at a time, under limits, for one thread at a time.

A picture that crashes its process, hangs it or eats its memory harms no other picture: the process
is replaced. Each process has a pipe of its own, so it is never in doubt whose picture it was, and
when the worker dies, even by ``kill -9``, the pipe ends and so do the processes.

A crash is tried once more in a fresh process, since the cause may lie outside (the kernel's
out-of-memory killer).

`pebble.ProcessPool` was tried: when an idle process of it dies, the whole pool is broken for good
(5.2.3, ``BrokenProcessPool: All workers expired``). The standard library's pool breaks with each
crash, and has no time limits.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import queue
import threading
from typing import Final

from visq.errors import ImageTooLarge, ImageUndecodable, Unavailable, VisqError
from visq.pixels import PixelBuffer, SharedMemoryFullError, reserved_name
from worker.media.decoder import Limits, serve

log = logging.getLogger(__name__)

_SPAWN: Final = multiprocessing.get_context("spawn")
_START_SECONDS: Final = 60.0
_TRIES: Final = 2
"""Processes that may fail with a picture before it is the picture's fault."""
_MAX_ANSWER: Final = 10_000

_ERRORS: Final[dict[str, type[VisqError]]] = {
    # (What is unavailable to a media process is shared memory.)
    kind.code: kind
    for kind in (ImageTooLarge, ImageUndecodable, SharedMemoryFullError)
}


class Decoders:
    """`processes` media processes; thread-safe."""

    def __init__(
        self, processes: int, *, max_bytes: int, max_pixels: int, timeout_seconds: float
    ) -> None:
        limits = Limits(max_bytes, max_pixels, timeout_seconds)
        self._all = [_Decoder(limits) for _ in range(processes)]
        self._free: queue.LifoQueue[_Decoder] = queue.LifoQueue()
        for decoder in self._all:
            self._free.put(decoder)

    @property
    def pids(self) -> list[int]:
        """The processes' ids now."""
        return [decoder.pid for decoder in self._all]

    def decode(self, data: bytes, sha256: str) -> PixelBuffer:
        """Decode the encoded image `data`; waits for a free process.

        :raises ImageTooLarge, ImageUndecodable: by the rules of `worker.media.decode`; the message
            is the end of a sentence that begins with the image's name.
        :raises SharedMemoryFullError: no room for its pixels.
        :raises Unavailable: no process, or `close` was called.
        """
        decoder = self._free.get()
        try:
            return decoder.decode(data, sha256)
        finally:
            self._free.put(decoder)

    def close(self) -> None:
        """End all processes. Idempotent."""
        for decoder in self._all:
            decoder.close()


class _CrashedError(Exception):
    """The process ended, spoke nonsense, or was silent for too long, before it answered."""

    def __init__(self, what: str = "crashed the media process that decoded it") -> None:
        super().__init__(what)


class _Decoder:
    """One media process, replaced when it dies; used by one thread at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()  # between the thread that uses it and the one that closes it
        self._closed = False
        self._started = False
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def decode(self, data: bytes, sha256: str) -> PixelBuffer:
        failure = ""
        for _ in range(_TRIES):
            if not self._process.is_alive():  # it died between two pictures
                self._restart()
            try:
                with reserved_name() as name:
                    height, width = self._ask(data, name)
                return PixelBuffer(name, height, width, sha256)
            except _CrashedError as error:
                failure = str(error)
                log.warning("media process %d: an image %s", self.pid, failure)
                self._restart()
        raise ImageUndecodable(failure)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._process.kill()
            self._process.join()

    def _ask(self, data: bytes, name: str) -> tuple[int, int]:
        """Have `data` decoded into shared memory `name`; return height and width."""
        self._await_start()
        try:
            self._pipe.send_bytes(name.encode())
            self._pipe.send_bytes(data)
            if self._pipe.poll(self._limits.seconds):
                return _parse(self._pipe.recv_bytes(_MAX_ANSWER), self._limits)
        except (EOFError, OSError) as error:
            raise _CrashedError from error
        # The image need not be the reason: the process may have been stopped, or starved.
        raise _CrashedError(f"took longer than {self._limits.seconds:g} s to decode")

    def _await_start(self) -> None:
        """Wait until the process has imported what it needs: not part of a picture's time."""
        if self._started:
            return
        try:
            self._started = self._pipe.poll(_START_SECONDS) and bool(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._started = False
        if not self._started:
            self._restart()
            raise Unavailable("a media process did not start; the worker's log says more")

    def _start(self) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._started = False
        self._process = _SPAWN.Process(
            target=serve, args=(theirs, self._limits), name="visq-media", daemon=True
        )
        self._process.start()
        theirs.close()  # else the pipe would not end with the process

    def _restart(self) -> None:
        with self._lock:
            if self._closed:
                raise Unavailable("the media processes are closed")
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._start()


def _parse(answer: bytes, limits: Limits) -> tuple[int, int]:
    """The answer of a process that has read untrusted bytes, so it is not trusted either."""
    try:
        content = json.loads(answer)
    except ValueError:
        raise _CrashedError from None
    match content:
        case {"height": int(height), "width": int(width)}:
            if height > 0 and width > 0 and height * width <= limits.pixels:
                return height, width
        case {"error": str(code), "message": str(message)} if code in _ERRORS:
            raise _ERRORS[code](message)
    raise _CrashedError
