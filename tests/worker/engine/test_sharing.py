"""Tensors in memory without a name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from worker.engine.sharing import mapped, share

TENSORS = {
    "pixel_values": torch.arange(2 * 3 * 5, dtype=torch.uint8).view(2, 3, 5),
    "image_grid_thw": torch.tensor([[1, 4, 6]]),
    "mask": torch.tensor([[True, False, True]]),
    "floats": torch.randn(7, 3)[:, 1:],
}


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("visq-prepared")


def test_tensors_of_any_shape_and_kind_come_through() -> None:
    fd, places = share(TENSORS)
    made = mapped(fd, places)
    os.close(fd)
    assert made.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor)


def test_the_memory_lives_as_long_as_the_last_tensor_and_holds_no_descriptor() -> None:
    before, open_before = mappings(), os.listdir("/proc/self/fd")
    fd, places = share(TENSORS)
    made = mapped(fd, places)
    os.close(fd)
    assert os.listdir("/proc/self/fd") == open_before
    part = made["pixel_values"][1]
    made.clear()
    assert mappings() == before + 1
    assert torch.equal(part, TENSORS["pixel_values"][1])
    del part
    assert mappings() == before


def test_a_write_that_finds_no_room_is_an_error_and_leaves_no_descriptor() -> None:
    program = """
import os, resource, torch
from worker.engine.sharing import share
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
before = os.listdir("/proc/self/fd")
try:
    share({"pixel_values": torch.zeros(10_000)})
except OSError:
    assert os.listdir("/proc/self/fd") == before
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == "refused\n"
