"""Tensors from one process to another, in memory that has no name.

A file in memory (``memfd_create``) goes through a pipe as a descriptor, and is gone with the last
process that holds it, however that ends: nothing has to be remembered or removed. Nor is it bounded
by the size of ``/dev/shm``, which pictures that wait for the model would take from those that are
being decoded (`visq.pixels`). A write that finds no memory is an error, not the end of the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def share(tensors: Mapping[str, torch.Tensor]) -> tuple[int, list[Place]]:
    """Copy tensors of the CPU into new memory.

    :returns: a descriptor, which the caller closes, and what `mapped` needs to know beside it.
    :raises OSError: if there is no room.
    """
    fd = os.memfd_create("visq-prepared")
    places: list[Place] = []
    try:
        with open(fd, "wb", closefd=False) as memory:
            end = 0
            for name, tensor in tensors.items():
                start = -(-end // ALIGNMENT) * ALIGNMENT
                places.append(Place(name, tensor.dtype, tuple(tensor.shape), start))
                memory.seek(start)
                memory.write(tensor.contiguous().numpy().data)
                end = places[-1].end
    except BaseException:
        os.close(fd)
        raise
    return fd, places


def mapped(fd: int, places: list[Place]) -> dict[str, torch.Tensor]:
    """The tensors as views of that memory, which is given back with the last of them.

    :param fd: may be closed afterwards.
    """
    size = max(place.end for place in places)
    # (`mmap.mmap` would keep a descriptor for each picture that waits.)
    memory = torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=size, dtype=torch.uint8)
    return {
        place.name: memory[place.start : place.end].view(place.dtype).view(place.shape)
        for place in places
    }
