"""Short prompts by CUDA graphs: of a layer's work on some hundred tokens, most would be launching.

As in `worker.engine.decoder`, a graph computes on fixed memory. There is one for each number of
tokens, rounded up (`TOKENS`), for prompts that are all new and for those that go on from a cached
beginning (`CONTEXT`). Tokens too many are a sequence of their own, in the padding block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from worker.engine.attention import Kernels, KVCache, Prefills, StepContext
from worker.engine.families.base import Family
from worker.engine.forward import hidden_states
from worker.engine.layout import Graphs, Layout, rounded

logger = logging.getLogger(__name__)

TOKENS: Final = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Numbers of new tokens for which graphs are made. On an H100 with 3 B parameters, the device takes
longer than the launching from some 2,500 tokens on."""
CONTEXT: Final = 8192
"""Most tokens of all contexts together, if there are any that are cached."""
SEQUENCES: Final = 8
"""Most sequences."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of some chunks of prompts stand; on the host."""

    spans: list[tuple[int, int, int]]
    """`Prefills.spans`."""
    rows: NDArray[np.int64]
    """`StepContext.rows` of these tokens."""
    context: NDArray[np.int64] | None
    """`Prefills.rows`."""

    @property
    def cu_new(self) -> NDArray[np.int32]:
        return _sums(end - start for start, end, _ in self.spans)

    @property
    def cu_context(self) -> NDArray[np.int32]:
        return _sums(length for _, _, length in self.spans)


def _sums(lengths: Iterable[int]) -> NDArray[np.int32]:
    """``(n + 1,)``: 0, the first length, the first two together, ..."""
    return np.cumsum([0, *lengths], dtype=np.int32)


@dataclass(slots=True)
class _Ready:
    layout: Layout
    embeddings: torch.Tensor
    """``(tokens, hidden)``."""
    run: Callable[[], torch.Tensor]


class Prefiller:
    def __init__(
        self, family: Family, cache: KVCache, kernels: Kernels, *, axes: int, graphs: bool
    ) -> None:
        """
        :param axes: of positions (`Family.positions`).
        :param graphs: ``False``: the same at once, for tests on the CPU.
        """
        self._family = family
        self._cache = cache
        self._kernels = kernels
        self._axes = axes
        self._weight = family.embed_tokens.weight
        self._graphs = Graphs(self._weight.device) if graphs else None
        self._ready: dict[tuple[int, int], _Ready] = {}

    @torch.inference_mode()
    def warm_up(self, tokens: int) -> None:
        """Make all graphs of up to so many tokens, the largest first."""
        for count in sorted((each for each in TOKENS if each <= tokens), reverse=True):
            for context in (CONTEXT, 0):
                self._ready[count, context] = self._make(count, context)

    def takes(self, places: Places) -> bool:
        """Whether there is a graph for these chunks."""
        return self._size(places) in self._ready

    def _size(self, places: Places) -> tuple[int, int] | None:
        tokens = rounded(len(places.rows), TOKENS)
        if tokens is None or len(places.spans) > SEQUENCES:
            return None
        if places.context is None:
            return tokens, 0
        missing = tokens - len(places.rows)
        return (tokens, CONTEXT) if len(places.context) + missing <= CONTEXT else None

    def run(
        self, embeddings: torch.Tensor, positions: NDArray[np.int64], places: Places
    ) -> torch.Tensor:
        """Compute chunks that it `takes`; returns the hidden states ``(T, hidden)``.

        They are valid until the next call.

        :param embeddings: ``(T, hidden)``.
        :param positions: ``(axes, T)``.
        """
        size = self._size(places)
        assert size is not None
        ready = self._ready[size]
        count = len(embeddings)
        ready.layout.send(lambda arrays: self._fill(arrays, positions, places))
        ready.embeddings[:count] = embeddings
        ready.embeddings[count:].zero_()  # what was there before may have been NaN
        return ready.run()[:count]

    @staticmethod
    def _fill(
        arrays: dict[str, NDArray[Any]], positions: NDArray[np.int64], places: Places
    ) -> None:
        count, real = len(places.rows), len(places.spans)
        padded = len(arrays["rows"]) - count
        arrays["positions"][:, :count] = positions
        arrays["positions"][:, count:] = 0
        arrays["rows"][:count] = places.rows
        arrays["rows"][count:] = 0
        # The padding is one sequence more; those behind it have no tokens.
        for name, sums in (("cu_new", places.cu_new), ("cu_context", places.cu_context)):
            arrays[name][: real + 1] = sums
            arrays[name][real + 1 :] = sums[-1] + padded
        if places.context is not None:
            arrays["context"][: len(places.context)] = places.context
            arrays["context"][len(places.context) :] = 0

    def _make(self, tokens: int, context: int) -> _Ready:
        fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "positions": (torch.int64, (self._axes, tokens)),
            "rows": (torch.int64, (tokens,)),
            "cu_new": (torch.int32, (SEQUENCES + 2,)),
            "cu_context": (torch.int32, (SEQUENCES + 2,)),
        }
        if context:
            fields["context"] = (torch.int64, (context,))
        device = self._weight.device
        layout = Layout(fields, device)
        layout["cu_new"][1:] = tokens
        layout["cu_context"][1:] = tokens
        shape = (tokens, self._weight.shape[1])
        embeddings = torch.zeros(shape, dtype=self._weight.dtype, device=device)

        def work() -> torch.Tensor:
            return self._forward(embeddings, layout, context)

        if self._graphs is None:
            return _Ready(layout, embeddings, work)
        begun = time.monotonic()
        run = self._graphs.capture(work)
        logger.info(
            "CUDA graph for %d tokens of prompts%s made in %.1f s",
            tokens,
            " after cached ones" if context else "",
            time.monotonic() - begun,
        )
        return _Ready(layout, embeddings, run)

    def _forward(self, embeddings: torch.Tensor, layout: Layout, context: int) -> torch.Tensor:
        cu_new, cu_context = layout["cu_new"], layout["cu_context"]
        tokens = len(embeddings)
        spans = [(0, tokens, context or tokens)]  # bounds, which is all that a graph needs
        if self._graphs is None:
            new, whole = cu_new.tolist(), cu_context.tolist()
            spans = [
                (new[i], new[i + 1], whole[i + 1] - whole[i])
                for i in range(len(new) - 1)
                if new[i + 1] > new[i]
            ]
        prefills = Prefills(spans, layout["context"] if context else None, cu_new, cu_context)
        step = StepContext(self._cache, self._kernels, layout["rows"], prefills=prefills)
        return hidden_states(self._family, embeddings, layout["positions"], step)
