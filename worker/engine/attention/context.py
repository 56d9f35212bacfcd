"""Where the tokens of one step stand: what the attention needs beside queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker.engine.attention.cache import KVCache


@dataclass(slots=True)
class Decodes:
    """One new token of each of B sequences."""

    tables: torch.Tensor
    """``(B, width)`` int32: the first page of each block of a sequence (`KVCache.pages_per_block`
    times the block's number), padded with 0."""
    lengths: torch.Tensor
    """``(B,)`` int32: tokens of each, the new one among them; at least 1."""
    bias: Any = None
    """What a kernel has made of the two tensors themselves, not of what is in them: in a CUDA graph
    it stays, while their content changes."""

    @property
    def count(self) -> int:
        return self.tables.shape[0]


@dataclass(slots=True)
class Prefills:
    """Several new tokens of each of n sequences, after the tokens that decode."""

    spans: Sequence[tuple[int, int, int]]
    """``(start, end, context)``: the tokens ``start`` to ``end`` of the step; and the tokens of the
    sequence up to the last new one, the new ones among them."""
    rows: torch.Tensor | None
    """``(sum of the contexts,)`` int64: the rows of a layer's cache (`KVCache.layer_rows`) of all
    tokens of all contexts; ``None`` if all of them are new."""
    cu_new: torch.Tensor
    """``(n + 1,)`` int32: sums of the numbers of new tokens, from 0."""
    cu_context: torch.Tensor
    """``(n + 1,)`` int32: sums of the lengths of the contexts, from 0."""

    @property
    def max_new(self) -> int:
        return max(end - start for start, end, _ in self.spans)

    @property
    def max_context(self) -> int:
        return max(context for _, _, context in self.spans)


@dataclass(frozen=True, slots=True)
class Kernels:
    """Who computes. All that are here do the same (`tests/worker/engine/attention`)."""

    name: str
    decode: Callable[[torch.Tensor, int, StepContext, float], torch.Tensor]
    """Queries ``(B, heads, head_dim)``, layer, step, scale -> ``(B, heads, head_dim)``, over the
    cache, in which the new keys and values are already."""
    prefill: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, int, StepContext, float], torch.Tensor
    ]
    """Queries ``(T, heads, head_dim)``, new keys and values ``(T, kv_heads, head_dim)``, layer,
    step, scale -> ``(T, heads, head_dim)``: T tokens of `StepContext.prefills`."""


@dataclass(slots=True)
class StepContext:
    """The T tokens of a step: first one of each decoding sequence, then the prefills'."""

    cache: KVCache
    kernels: Kernels
    rows: torch.Tensor
    """``(T,)`` int64: the row of a layer's cache into which each token's key and value go."""
    decodes: Decodes | None = None
    prefills: Prefills | None = None
    scratch: Any = None
    """What a kernel has made of the content of `decodes`, for all layers of this step."""
    calls: int = 0
    """Layers that have run."""
