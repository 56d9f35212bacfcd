"""Pictures and media processes for tests of decoding."""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path

import psutil
from PIL import Image

from worker.media.decoders import Decoders


def png(width: int = 8, height: int = 6, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), 1).save(file, "PNG")
    return file.getvalue()


@cache
def noise(side: int) -> bytes:
    """A picture that takes a while to decode."""
    file = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


def segments() -> set[str]:
    """What this process has in shared memory."""
    return {path.name for path in Path("/dev/shm").glob(f"visq-{os.getpid()}-*")}


def started(processes: int = 1, **changes: float) -> Decoders:
    limits = {"max_bytes": 50_000_000, "max_pixels": 30_000_000, "timeout_seconds": 60.0}
    return Decoders(processes, **{**limits, **changes})  # type: ignore[arg-type]


def cpu(pid: int) -> float:
    return psutil.Process(pid).cpu_times().user
