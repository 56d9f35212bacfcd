"""Steps in which each sequence decodes one token: the same work again and again, so that a CUDA
graph can be made of it.

A graph computes on fixed memory. What changes from step to step (who, where, how far, which blocks)
goes there by a `Layout`; a sequence's newest token is read on the device, where it was sampled.
There is a graph for each number of sequences and width of the page tables, rounded up (`COUNTS`,
`WIDTHS`); rows too many are padding: their token goes to the padding block, and nobody reads what
comes of it.

Without graphs (on the CPU, in tests) the very same code runs at once, unrounded.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from worker.engine.attention import Decodes, Kernels, KVCache, StepContext, sdpa
from worker.engine.blocks import PADDING
from worker.engine.families.base import Family
from worker.engine.forward import hidden_states
from worker.engine.layout import Graphs, Layout, rounded
from worker.engine.scheduler import Chunk

logger = logging.getLogger(__name__)

COUNTS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512)
"""Numbers of sequences for which graphs are made."""
FEW_COUNTS: Final = (1, 4, 16, 64, 256, 512)
"""The same for page tables that are wider than the narrowest: each graph takes up to a second."""
WIDTHS: Final = (16, 64, 256, 1024, 4096)
"""Widths of page tables for which graphs are made: with blocks of 64 tokens, 1k to 256k tokens."""
WARMED: Final = 2
"""Of the widths, those whose graphs are made at the start. The others' are made when a sequence
becomes that long, which holds up everybody for up to a second, at most once for each count."""


@dataclass(slots=True)
class _Ready:
    """What computes steps of one size."""

    layout: Layout
    decodes: Decodes
    """Over the layout's tensors. A graph reads what a kernel has made of it."""
    run: Callable[[], torch.Tensor]
    """Returns the hidden states, ``(count, hidden)``."""


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
        self._graphs = Graphs(self._device) if graphs else None
        # SDPA gathers all that a table has room for: with it, wide tables are left to steps that
        # are made to measure.
        self._widest = WIDTHS[0] if graphs and kernels.decode is sdpa.decode else sys.maxsize
        self._ready: dict[tuple[int, int], _Ready] = {}
        self._pages = np.zeros((self._slots, 16), dtype=np.int32)

    @torch.inference_mode()
    def warm_up(self, most: int, longest: int) -> None:
        """Make the graphs of steps of up to `most` sequences, each of up to `longest` tokens, as
        far as they are made at the start; the largest first, so that all share its memory."""
        needed = min(self._width(longest), self._widest)
        covering = rounded(needed, WIDTHS) or needed
        for width in reversed([width for width in WIDTHS[:WARMED] if width <= covering]):
            counts = {self._size(count, width)[0] for count in range(1, most + 1)}
            for count in sorted(counts, reverse=True):
                self._ready[count, width] = self._make(count, width)

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether it should run these."""
        return self._width(max(chunk.end for chunk in chunks)) <= self._widest

    def _width(self, tokens: int) -> int:
        return -(-tokens // self._cache.block_size)

    def _size(self, count: int, width: int) -> tuple[int, int]:
        """Number of sequences and width of the graph for a step."""
        width = rounded(width, WIDTHS) or width
        counts = COUNTS if width == WIDTHS[0] else FEW_COUNTS
        return rounded(count, counts) or -(-count // 256) * 256, width

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The hidden states after the newest token of each sequence, ``(chunks, hidden)``.

        They are valid until the next call.
        """
        count = len(chunks)
        key = count, self._width(max(chunk.end for chunk in chunks))
        if self._graphs is not None:
            key = self._size(*key)
        ready = self._ready.get(key)
        if ready is None:
            ready = self._make(*key)
            if self._graphs is not None:
                self._ready[key] = ready
        ready.layout.send(lambda arrays: self._fill(arrays, chunks))
        return ready.run()[:count]

    def _fill(self, arrays: dict[str, NDArray[Any]], chunks: Sequence[Chunk]) -> None:
        count, size = len(chunks), self._cache.block_size
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, count)
        slots = np.fromiter((chunk.sequence.slot for chunk in chunks), np.int64, count)
        deltas = np.fromiter((chunk.sequence.delta for chunk in chunks), np.int64, count)
        for chunk in chunks:
            if chunk.sequence.tabled != len(chunk.sequence.blocks):
                self._tabulate(chunk)
        tables = arrays["tables"]
        known = min(tables.shape[1], self._pages.shape[1])
        tables[:count, :known] = self._pages[slots, :known]
        tables[:count, known:] = PADDING
        pages = self._pages[slots, starts // size].astype(np.int64)
        for name, values, padding in (
            ("slots", slots, self._slots),
            ("positions", starts + deltas, 0),
            ("rows", pages * size + starts % size, 0),
            ("lengths", starts + 1, 1),
        ):
            arrays[name][:count] = values
            arrays[name][count:] = padding
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
        fields = {
            "slots": (torch.int64, (count,)),
            "positions": (torch.int64, (count,)),
            "rows": (torch.int64, (count,)),
            "lengths": (torch.int32, (count,)),
            "tables": (torch.int32, (count, width)),
        }
        layout = Layout(fields, self._device)
        layout["slots"].fill_(self._slots)
        layout["lengths"].fill_(1)
        decodes = Decodes(layout["tables"], layout["lengths"])
        if self._graphs is None:
            return _Ready(layout, decodes, lambda: self._forward(layout, decodes))
        begun = time.monotonic()
        run = self._graphs.capture(lambda: self._forward(layout, decodes))
        logger.info(
            "CUDA graph for %d sequences of up to %d tokens made in %.1f s",
            count,
            width * self._cache.block_size,
            time.monotonic() - begun,
        )
        return _Ready(layout, decodes, run)

    def _forward(self, layout: Layout, decodes: Decodes) -> torch.Tensor:
        step = StepContext(self._cache, self._kernels, layout["rows"], decodes=decodes)
        embeddings = self._family.embed_tokens(self._last_tokens[layout["slots"]])
        positions = layout["positions"].expand(self._axes, -1)
        return hidden_states(self._family, embeddings, positions, step)
