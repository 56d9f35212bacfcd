"""Pictures over which the C code of a decoder really dies, by a segmentation fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# The media processes run this module as well, before they decode anything.
SCRIPT = """
import ctypes, io, os
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from visq.errors import ImageUndecodable
from worker.media import decoder
from worker.media.decoders import Decoders

decode = decoder.decode

def decode_or_die(data, max_pixels):
    if data == b"poison":
        ctypes.string_at(0)
    return decode(data, max_pixels)

decoder.decode = decode_or_die

def png(side):
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()

if __name__ == "__main__":
    decoders = Decoders(2, max_bytes=10**7, max_pixels=10**7, timeout_seconds=60)
    before = set(decoders.pids)
    with ThreadPoolExecutor(8) as threads:
        asked = [
            threads.submit(
                decoders.decode,
                b"poison" if number in (3, 17) else png(number + 1),
                "0" * 64,
            )
            for number in range(30)
        ]
    for number, each in enumerate(asked):
        if number in (3, 17):
            error = each.exception()
            assert isinstance(error, ImageUndecodable), error
            assert str(error).startswith("crashed"), error
        else:
            assert each.result().array().shape == (number + 1, number + 1, 3)
            each.result().release()
    assert set(decoders.pids) != before
    decoders.close()
    left = [name for name in os.listdir("/dev/shm") if name.startswith(f"visq-{os.getpid()}-")]
    assert left == [], left
    print("well")
"""


def test_a_picture_that_kills_its_decoder_fails_alone_with_its_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[3])},
        timeout=120,
    )
    assert done.stdout.strip() == "well", done.stderr
    assert done.stderr.count("crashed") >= 4, "each is tried twice"
