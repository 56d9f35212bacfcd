"""Steps in which each sequence decodes one token: the same work again and again, so that a CUDA
graph can be made of it.

A graph computes on fixed memory. So what changes from step to step (who, where, how far, which
blocks) is laid out by the host in one small piece of memory and copied to the device at once; a
sequence's newest token is read on the device, where it was sampled. There is a graph for each
number of sequences and width of the page tables, rounded up (`COUNTS`, `WIDTHS`); rows too many are
padding: their token goes to the padding block, and nobody reads what comes of it.

Without graphs (on the CPU, in tests) the very same code runs at once, unrounded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from worker.engine.attention import Decodes, Kernels, KVCache, StepContext, attending
from worker.engine.blocks import PADDING
from worker.engine.families.base import Family
from worker.engine.scheduler import Chunk

logger = logging.getLogger(__name__)

COUNTS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512)
"""Numbers of sequences for which graphs are made."""
WIDTHS: Final = (16, 64, 256, 1024, 4096)
"""Widths of page tables for which graphs are made: with blocks of 64 tokens, 1k to 256k tokens."""
IN_FLIGHT: Final = 3
"""Steps whose layout is in use at a time, at most: one that runs, one that waits, and a new one."""


@dataclass(slots=True)
class _Layout:
    """What a step is told, as views of one piece of memory; on the host, or on the device."""

    memory: torch.Tensor
    slots: torch.Tensor
    """``(count,)`` int64."""
    positions: torch.Tensor
    """``(count,)`` int64."""
    rows: torch.Tensor
    """``(count,)`` int64: `StepContext.rows`."""
    lengths: torch.Tensor
    """``(count,)`` int32."""
    tables: torch.Tensor
    """``(count, width)`` int32."""

    @classmethod
    def make(cls, count: int, width: int, *, device: torch.device, pinned: bool) -> _Layout:
        # Each part begins at a multiple of 16 bytes: kernels are compiled for that, or for less.
        sizes = [-(-each // 16) * 16 for each in (*[8 * count] * 3, 4 * count, 4 * count * width)]
        memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pinned)
        slots, positions, rows, lengths, tables = torch.split(memory, sizes)
        return cls(
            memory,
            slots.view(torch.int64)[:count],
            positions.view(torch.int64)[:count],
            rows.view(torch.int64)[:count],
            lengths.view(torch.int32)[:count],
            tables.view(torch.int32)[: count * width].view(count, width),
        )


@dataclass(slots=True)
class _Ready:
    """What computes steps of one size."""

    hosts: Any
    """Layouts on the host, one after the other, for ever."""
    device: _Layout
    run: Callable[[], torch.Tensor]
    """Returns the hidden states, ``(count, hidden)``; of a graph, always in the same memory."""


class Decoder:
    def __init__(
        self,
        family: Family,
        cache: KVCache,
        kernels: Kernels,
        last_tokens: torch.Tensor,
        *,
        axes: int,
        graphs: bool,
    ) -> None:
        """
        :param last_tokens: ``(slots + 1,)`` int64: the newest token of each slot; the last one is
            for padding.
        :param axes: of positions (`Family.positions`).
        :param graphs: whether to make CUDA graphs.
        """
        self._family = family
        self._cache = cache
        self._kernels = kernels
        self._last_tokens = last_tokens
        self._device = last_tokens.device
        self._slots = len(last_tokens) - 1
        self._axes = axes
        self._graphs = graphs
        self._ready: dict[tuple[int, int], _Ready] = {}
        self._memory: Any = None  # of all graphs together
        self._pages = np.zeros((self._slots, 16), dtype=np.int32)

    @torch.inference_mode()
    def warm_up(self, counts: Sequence[int], width: int) -> None:
        """Make what steps of these sizes need; the largest first, so that all share its memory."""
        for count in sorted(counts, reverse=True):
            self._ready[count, width] = self._make(count, width)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The hidden states after the newest token of each sequence, ``(chunks, hidden)``.

        They are valid until the next call.
        """
        count = len(chunks)
        width = -(-max(chunk.end for chunk in chunks) // self._cache.block_size)
        if self._graphs:
            key = _rounded(count, COUNTS), _rounded(width, WIDTHS)
        else:
            key = count, width
        ready = self._ready.get(key)
        if ready is None:
            ready = self._make(*key)
            if self._graphs:
                self._ready[key] = ready
        host = next(ready.hosts)
        self._fill(host, chunks)
        if host is not ready.device:
            ready.device.memory.copy_(host.memory, non_blocking=True)
        return ready.run()[:count]

    def _fill(self, host: _Layout, chunks: Sequence[Chunk]) -> None:
        count, size = len(chunks), self._cache.block_size
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, count)
        slots = np.fromiter((chunk.sequence.slot for chunk in chunks), np.int64, count)
        deltas = np.fromiter((chunk.sequence.delta for chunk in chunks), np.int64, count)
        for chunk in chunks:
            if chunk.sequence.tabled != len(chunk.sequence.blocks):
                self._tabulate(chunk)
        width = host.tables.shape[1]
        tables: NDArray[np.int32] = host.tables.numpy()
        known = min(width, self._pages.shape[1])
        tables[:count, :known] = self._pages[slots, :known]
        tables[:count, known:] = PADDING
        pages = self._pages[slots, starts // size].astype(np.int64)
        host.slots.numpy()[:count] = slots
        host.positions.numpy()[:count] = starts + deltas
        host.rows.numpy()[:count] = pages * size + starts % size
        host.lengths.numpy()[:count] = starts + 1
        host.slots.numpy()[count:] = self._slots
        host.positions.numpy()[count:] = 0
        host.rows.numpy()[count:] = 0
        host.lengths.numpy()[count:] = 1
        tables[count:] = PADDING

    def _tabulate(self, chunk: Chunk) -> None:
        """Note the pages of blocks that a sequence has got since it was seen last."""
        sequence = chunk.sequence
        blocks = sequence.blocks
        if len(blocks) > self._pages.shape[1]:
            wider = np.zeros((self._slots, 2 * len(blocks)), dtype=np.int32)
            wider[:, : self._pages.shape[1]] = self._pages
            self._pages = wider
        row = self._pages[sequence.slot]
        new = np.array(blocks[sequence.tabled :], dtype=np.int32)
        row[sequence.tabled : len(blocks)] = new * self._cache.pages_per_block
        row[len(blocks) :] = PADDING
        sequence.tabled = len(blocks)

    def _make(self, count: int, width: int) -> _Ready:
        on_host = self._device.type == "cpu"
        device = _Layout.make(count, width, device=self._device, pinned=False)
        hosts = [device]
        if not on_host:
            cpu = torch.device("cpu")
            hosts = [_Layout.make(count, width, device=cpu, pinned=True) for _ in range(IN_FLIGHT)]
        device.slots.fill_(self._slots)
        device.lengths.fill_(1)
        if not self._graphs:
            return _Ready(cycle(hosts), device, lambda: self._forward(device, Decodes))
        begun = time.monotonic()
        # One description for all replays: a kernel may keep what it has made of it.
        decodes = Decodes(device.tables, device.lengths)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, and lets libraries take their work space
                self._forward(device, lambda *_: decodes)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # (Other threads may use CUDA meanwhile.)
        mode = "thread_local"
        with torch.cuda.graph(graph, self._memory, stream, capture_error_mode=mode):
            hidden = self._forward(device, lambda *_: decodes)
        if self._memory is None:
            self._memory = graph.pool()
        logger.info(
            "CUDA graph for %d sequences of up to %d tokens made in %.1f s",
            count,
            width * self._cache.block_size,
            time.monotonic() - begun,
        )

        def replay() -> torch.Tensor:
            graph.replay()
            return hidden

        return _Ready(cycle(hosts), device, replay)

    def _forward(self, layout: _Layout, decodes: Callable[..., Decodes]) -> torch.Tensor:
        step = StepContext(
            self._cache,
            self._kernels,
            layout.rows,
            decodes=decodes(layout.tables, layout.lengths),
        )
        embeddings = self._family.embed_tokens(self._last_tokens[layout.slots])
        positions = layout.positions.expand(self._axes, -1)
        with attending(step):
            hidden: torch.Tensor = self._family.decoder(
                inputs_embeds=embeddings.unsqueeze(0),
                use_cache=False,
                attention_mask=None,
                visq=step,
                **self._family.decoder_kwargs(positions, []),
            ).last_hidden_state[0]
        return hidden


def _rounded(number: int, steps: Sequence[int]) -> int:
    return next((step for step in steps if step >= number), number)
