"""A /dev/shm that is really full: what finds no room may come again, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PICTURES = """
import io, os, sys
from PIL import Image
from visq.errors import Unavailable
from worker.media.decoders import Decoders
from worker.media.pixel_cache import PixelCache

def png(side):
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()
"""

DECODERS = """
if __name__ == "__main__":
    decoders = Decoders(1, max_bytes=10**7, max_pixels=10**7, timeout_seconds=60)
    [pid] = decoders.pids
    def decode(side):
        return decoders.decode(png(side), "0" * 64)
    held = decode(500)  # 750 kB of 1 MiB
    for _ in range(3):
        try:
            decode(400)
            sys.exit("there was room")
        except Unavailable as error:
            assert error.retryable and "shared memory is full" in str(error), error
        assert os.listdir("/dev/shm") == [held.name.lstrip("/")], os.listdir("/dev/shm")
    decode(100).release()  # what is small still comes
    assert held.array().shape == (500, 500, 3)
    held.release()
    again = decode(400)
    assert again.array().shape == (400, 400, 3)
    again.release()
    assert decoders.pids == [pid], "no process died of it"
    assert os.listdir("/dev/shm") == []
    decoders.close()
    print("well")
"""

CACHE = """
if __name__ == "__main__":
    decoders = Decoders(1, max_bytes=10**7, max_pixels=10**7, timeout_seconds=60)
    cache = PixelCache(decoders.decode, 10**6)
    def get(side):
        return cache.get(png(side), str(side))
    for side in (100, 200, 400):
        get(side).release()
    assert len(os.listdir("/dev/shm")) == 3
    large = get(500)  # 750 kB of 1 MiB: what nobody uses makes room for it
    assert large.array().shape == (500, 500, 3)
    assert os.listdir("/dev/shm") == [large.name.lstrip("/")], os.listdir("/dev/shm")
    try:
        get(400)
        sys.exit("there was room")
    except Unavailable as error:
        assert error.retryable and "shared memory is full" in str(error), error
    large.release()
    get(400).release()
    assert not cache.knows("500")
    decoders.close()
    cache.close()
    assert os.listdir("/dev/shm") == []
    print("well")
"""

IN_ITS_OWN = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'


def run(code: str, folder: Path) -> None:
    """Run `code`, which says "well" at its end, with a /dev/shm of 1 MiB."""
    own = ["unshare", "--mount", "sh", "-c", IN_ITS_OWN, "sh"]
    if subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system of its own")
    script = folder / "script.py"
    script.write_text(PICTURES + code)
    done = subprocess.run(
        [*own, sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        timeout=120,
    )
    assert done.stdout.strip() == "well", done.stderr


def test_a_picture_without_room_in_shared_memory_may_come_again_and_others_are_not_harmed(
    tmp_path: Path,
) -> None:
    run(DECODERS, tmp_path)


def test_pixels_that_nobody_uses_make_room(tmp_path: Path) -> None:
    run(CACHE, tmp_path)
