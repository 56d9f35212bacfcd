"""What runs in a media process: a loop that reads encoded bytes and writes pixels.

The process reads untrusted bytes with C libraries, so it is small and bounded: in memory and in
time, by the kernel. It ends when the pipe to its worker does. It answers in JSON: unlike a pickle,
that cannot run anything in the worker.
"""

from __future__ import annotations

import json
import resource
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from visq.errors import ImageTooLarge, VisqError
from visq.pixels import write_pixels
from worker.media.decode import OUT_OF_MEMORY, decode

_MIB: Final = 1024 * 1024

# What decoding may take beyond what the process has when it starts: up to six copies of the
# picture in 4 bytes a pixel, its pixels here and in shared memory, and its encoded bytes twice.
_BYTES_A_PIXEL: Final = 32
_ENCODED_COPIES: Final = 4
_SPARE_BYTES: Final = 256 * _MIB

_GRACE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one picture may take."""

    bytes: int
    """Encoded."""
    pixels: int
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes of address space."""
        return self.pixels * _BYTES_A_PIXEL + self.bytes * _ENCODED_COPIES + _SPARE_BYTES


def serve(pipe: Connection, limits: Limits) -> None:
    """Say that it is ready; then, for each name and encoded bytes that come, decode and answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker
    _limit_memory(limits)
    try:
        pipe.send_bytes(b"ready")
        while True:
            name, data = pipe.recv_bytes().decode(), pipe.recv_bytes()
            # The worker ends a process that is too slow. If the worker is dead, the kernel does.
            signal.setitimer(signal.ITIMER_REAL, limits.seconds + _GRACE_SECONDS)
            answer = _answer(name, data, limits)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send_bytes(json.dumps(answer).encode())
    except (EOFError, OSError):
        return  # the worker has gone


def _answer(name: str, data: bytes, limits: Limits) -> dict[str, str | int]:
    """Decode `data` into shared memory `name`. A fault that no rule names ends the process."""
    try:
        pixels = decode(data, limits.pixels)
        write_pixels(name, pixels)
    except VisqError as error:
        return {"error": error.code, "message": error.message}
    except MemoryError:
        return {"error": ImageTooLarge.code, "message": OUT_OF_MEMORY}
    return {"height": pixels.shape[0], "width": pixels.shape[1]}


def _limit_memory(limits: Limits) -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = in_use + limits.memory
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no dumps of pictures
