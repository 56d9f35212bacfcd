"""Where the tokens of one step stand: what the attention needs beside queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from worker.engine.attention.cache import KVCache


@dataclass(frozen=True, slots=True)
class Prefill:
    """Several new tokens of one sequence."""

    start: int
    end: int
    """The tokens ``start`` to ``end`` of the step."""
    context: int
    """Tokens of the sequence up to the last new one; the new ones are among them."""
    blocks: torch.Tensor
    """``(n,)`` int64: the blocks that hold the context, in order."""


@dataclass(slots=True)
class StepContext:
    """The T tokens of a step: first one of each decoding sequence, then the prefills'."""

    cache: KVCache
    blocks: torch.Tensor
    """``(T,)`` int64: the block into which each token's key and value go."""
    offsets: torch.Tensor
    """``(T,)`` int64: the place in that block."""
    decodes: int
    """Number of sequences that decode."""
    tables: torch.Tensor
    """``(decodes, width)`` int64: blocks of each decoding sequence, padded with 0."""
    mask: torch.Tensor
    """``(decodes, 1, 1, width * block_size)`` bool: which tokens of its blocks each may see."""
    prefills: Sequence[Prefill] = field(default_factory=tuple)
    calls: int = 0
    """Layers that have run (`worker.engine.probe` compares)."""
