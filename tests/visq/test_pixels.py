"""Pixels in shared memory: what is written, who removes it, and what a kill leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from tests.waiting import until
from visq.errors import Unavailable
from visq.pixels import PixelBuffer, reserved_name, write_pixels

SHA = "0" * 64


def picture(height: int = 3, width: int = 5) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def exists(buffer: PixelBuffer) -> bool:
    return Path(f"/dev/shm{buffer.name}").exists()


def test_a_buffer_gives_its_pixels_until_it_is_released() -> None:
    buffer = PixelBuffer.create(picture(), SHA)
    assert (buffer.height, buffer.width, buffer.sha256) == (3, 5, SHA)
    assert np.array_equal(buffer.array(), picture())
    buffer.release()
    assert not exists(buffer)
    with pytest.raises(Unavailable):
        buffer.array()


def test_release_is_idempotent_and_leaves_held_arrays_alone() -> None:
    buffer = PixelBuffer.create(picture(), SHA)
    held = buffer.array()
    buffer.release()
    buffer.release()
    assert np.array_equal(held, picture())


def test_arrays_are_read_only() -> None:
    buffer = PixelBuffer.create(picture(), SHA)
    array = buffer.array()
    buffer.release()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0, 0] = 1


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2), np.uint8),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
        np.zeros((2, 2, 3), np.float32),
    ],
)
def test_only_rgb_pictures_of_uint8_are_written(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="RGB"):
        PixelBuffer.create(array, SHA)


def test_a_picture_larger_than_the_shared_memory_is_an_error_and_leaves_nothing() -> None:
    room = os.statvfs("/dev/shm")
    # More than all of it, not than what is free: the kernel sees that before it reserves anything.
    width = 2 * room.f_blocks * room.f_frsize // 3
    too_large = np.broadcast_to(np.uint8(1), (1, width, 3))
    with pytest.raises(Unavailable, match="/dev/shm") as raised, reserved_name() as name:
        write_pixels(name, too_large)
    assert raised.value.retryable
    assert not Path(f"/dev/shm{name}").exists()


def test_a_failure_removes_what_was_written_under_a_reserved_name() -> None:
    with pytest.raises(RuntimeError, match="after writing"), reserved_name() as name:  # noqa: PT012
        write_pixels(name, picture())
        raise RuntimeError("after writing")
    assert not Path(f"/dev/shm{name}").exists()


def _read(buffer: PixelBuffer, pipe: Connection) -> None:
    pipe.send_bytes(buffer.array().tobytes())


def test_a_process_that_reads_a_buffer_and_ends_does_not_remove_it() -> None:
    spawn = multiprocessing.get_context("spawn")
    buffer = PixelBuffer.create(picture(), SHA)
    ours, theirs = spawn.Pipe()
    reader = spawn.Process(target=_read, args=(buffer, theirs))
    reader.start()
    assert ours.recv_bytes() == picture().tobytes()
    reader.join()
    assert exists(buffer)
    buffer.release()


WORKER = """
import multiprocessing, sys, time
import numpy as np
from visq.pixels import PixelBuffer

def read_for_ever(buffer):
    buffer.array()
    time.sleep(600)

if __name__ == "__main__":
    buffer = PixelBuffer.create(np.zeros((4, 4, 3), np.uint8), "0" * 64)
    child = multiprocessing.get_context("spawn").Process(target=read_for_ever, args=(buffer,))
    child.start()
    print(buffer.name, child.pid, flush=True)
    {end}
"""


def _start(tmp_path: Path, end: str) -> tuple[subprocess.Popen[str], Path, int]:
    """A worker with one buffer and a child that reads it: the process, the file, the child."""
    script = tmp_path / "service.py"
    script.write_text(WORKER.replace("{end}", end))
    worker = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert worker.stdout is not None
    name, child = worker.stdout.readline().split()
    return worker, Path(f"/dev/shm{name}"), int(child)


def test_kill_9_of_the_worker_leaves_no_memory_once_its_children_are_gone(tmp_path: Path) -> None:
    worker, memory, child = _start(tmp_path, "time.sleep(600)")
    assert memory.exists()
    worker.kill()
    worker.wait()
    os.kill(child, signal.SIGKILL)
    until(lambda: not memory.exists(), 20, "the resource tracker to remove the memory")


def test_a_worker_that_releases_its_buffers_ends_without_a_word_of_the_tracker(
    tmp_path: Path,
) -> None:
    end = "child.kill(); child.join(); buffer.release(); buffer.release()"
    worker, memory, _ = _start(tmp_path, end)
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert errors == ""
    assert not memory.exists()
