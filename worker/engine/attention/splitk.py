"""Paged decode attention by xformers' ``triton_splitk``, on CUDA in half precision.

Only inside a CUDA graph is it fast: a call costs the host some 350 us, the device 6 to 60.

The operator is called past xformers' dispatch. That has two reasons: on a torch built for CUDA 13
the extension in xformers' wheel does not load, and then its dispatch refuses every operator on
CUDA, this one too, though it is Triton and needs no extension; and for more than 32 tokens the
dispatch never chooses it for a paged cache. What the dispatch would have checked, `supports` and
the probe of `worker.engine.attention.ladder` check.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Final

import torch

from worker.engine.attention.context import Decodes, StepContext

PAGE: Final = 64
"""Tokens of a page must be a multiple of this."""
HEAD_DIMS: Final = frozenset({16, 32, 64, 128, 256, 512})
DTYPES: Final = frozenset({torch.float16, torch.bfloat16})
PROGRAMS: Final = 512
"""Blocks of threads to aim at: some four for each multiprocessor of an H100."""


def supports(head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel exists for this."""
    return (
        device.type == "cuda"
        and dtype in DTYPES
        and head_dim in HEAD_DIMS
        and block_size % PAGE == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def decode(query: torch.Tensor, layer: int, step: StepContext, scale: float) -> torch.Tensor:
    """See `Kernels.decode`."""
    from xformers.ops.fmha.common import Inputs

    assert step.decodes is not None
    keys, values = step.cache.layer_rows(layer)
    rows, heads, dim = query.shape
    kv_heads = keys.shape[1]
    shared = heads // kv_heads
    if step.decodes.bias is None:
        step.decodes.bias = _bias(step.decodes, step.cache.block_size)
    bias = step.decodes.bias
    inputs = Inputs(
        query=query.reshape(1, rows, kv_heads, shared, dim),
        key=keys[None, :, :, None].expand(-1, -1, -1, shared, -1),
        value=values[None, :, :, None].expand(-1, -1, -1, shared, -1),
        attn_bias=bias,
        scale=scale,
    )
    width = bias.block_tables.shape[1] * step.cache.block_size
    operator = _operator(splits(rows * kv_heads, width))
    out: torch.Tensor = operator.apply(inputs, needs_gradient=False)[0]
    return out.reshape(rows, heads, dim)


def splits(pairs: int, width: int) -> int:
    """In how many parts the keys of a sequence are worked on side by side: a power of two.

    :param pairs: sequences times key heads.
    :param width: most tokens of a sequence.
    """
    wanted = max(1, PROGRAMS // pairs)
    return int(min(1 << (wanted.bit_length() - 1), 64, max(1, width // PAGE)))


@cache
def _operator(split_k: int) -> Any:
    from xformers.ops.fmha import triton_splitk

    # Measured on an H100 (bench/results/): the best, or within 2 % of it, from 1 to 256 sequences.
    tuned = {"SPLIT_K": split_k, "NUM_WARPS": 4, "NUM_STAGES": 2}
    return type(f"SplitK{split_k}", (triton_splitk.FwOp,), tuned)


def _bias(decodes: Decodes, block_size: int) -> Any:
    """xformers' description of the step, over the very tensors of `decodes`: what is written to
    them before a CUDA graph is replayed is what it sees."""
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask

    count, width = decodes.tables.shape
    bias = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        [1] * count,
        [width * block_size] * count,
        decodes.tables,
        block_size,
        device=decodes.tables.device,
    )
    return replace(bias, k_seqinfo=replace(bias.k_seqinfo, seqlen=decodes.lengths))
