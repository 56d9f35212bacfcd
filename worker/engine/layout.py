"""Small arrays that change with each step, laid out by the host and sent to the device in one copy.

A CUDA graph reads them there, always in the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import prod
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

HOSTS: Final = 3
"""Copies of a layout on the host: one whose step runs, one whose step waits, and a new one. The
host waits for one only where it is further ahead than that."""

ALIGNED: Final = 16
"""Each array begins at a multiple of so many bytes: kernels are compiled for that, or for less."""

Fields = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each array."""


@dataclass(slots=True)
class _Memory:
    whole: torch.Tensor
    arrays: dict[str, torch.Tensor]
    read: Any = None
    """On the host: a CUDA event, when the device has read what was written here last."""

    @classmethod
    def make(cls, fields: Fields, device: torch.device, *, pinned: bool) -> _Memory:
        sizes = [-(-_nbytes(each) // ALIGNED) * ALIGNED for each in fields.values()]
        whole = torch.zeros(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pinned)
        parts: Sequence[torch.Tensor] = torch.split(whole, sizes)
        arrays = {
            name: part[: _nbytes((dtype, shape))].view(dtype).view(shape)
            for (name, (dtype, shape)), part in zip(fields.items(), parts, strict=True)
        }
        return cls(whole, arrays)


def _nbytes(field: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = field
    return dtype.itemsize * prod(shape)


class Layout:
    """Arrays by name: written on the host, read on the device."""

    def __init__(self, fields: Fields, device: torch.device) -> None:
        self._device = _Memory.make(fields, device, pinned=False)
        hosts = [self._device]
        if device.type != "cpu":
            cpu = torch.device("cpu")
            hosts = [_Memory.make(fields, cpu, pinned=True) for _ in range(HOSTS)]
        self._hosts = cycle(hosts)

    def __getitem__(self, name: str) -> torch.Tensor:
        """On the device."""
        return self._device.arrays[name]

    def send(self, fill: Callable[[dict[str, NDArray[Any]]], None]) -> None:
        """Let `fill` write all arrays, then copy them to the device, without waiting for it."""
        host = next(self._hosts)
        if host.read is not None:
            host.read.synchronize()
        fill({name: np.asarray(array) for name, array in host.arrays.items()})
        if host is not self._device:
            self._device.whole.copy_(host.whole, non_blocking=True)
            host.read = host.read or torch.cuda.Event()  # type: ignore[no-untyped-call]
            host.read.record()


class Graphs:
    """CUDA graphs that share their memory; one at a time runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = None

    def capture(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Return what does the same as `work`: its result is always in the same memory, and valid
        until any of these graphs is run again."""
        stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, and lets libraries take their work space
                work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # (Other threads may use CUDA meanwhile.)
        mode = "thread_local"
        with torch.cuda.graph(graph, self._memory, stream, capture_error_mode=mode):
            result = work()
        if self._memory is None:
            self._memory = graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def rounded(number: int, steps: Sequence[int]) -> int | None:
    """The smallest of `steps` that is not less; ``None``: all are."""
    return next((step for step in steps if step >= number), None)
