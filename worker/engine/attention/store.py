"""Puts a step's new keys and values into the cache: a copy of rows, for a layer at a time.

On CUDA by a kernel of our own, since it is called for each layer of each step: torch's
``index_copy_`` takes two kernels, one for the keys and one for the values, and together 6 of a
layer's 110 us (docs/decisions/010-attention-on-cuda.md).
"""

from __future__ import annotations

from typing import Final

import torch

from worker.engine.toolchain import c_compiler

WARPS: Final = 4


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """
    :param key, value: ``(T, kv_heads, head_dim)``, the last dimension contiguous.
    :param keys, values: ``(rows, kv_heads, head_dim)``, contiguous: `KVCache.layer_rows`.
    :param rows: ``(T,)`` int64: where each token goes.
    """
    if not key.is_cuda or c_compiler() is None:
        keys.index_copy_(0, rows, key)
        values.index_copy_(0, rows, value)
        return
    from worker.engine.attention.store_kernel import store_kernel

    heads, dim = key.shape[1:]
    store_kernel[(key.shape[0],)](
        key, value, keys, values, rows,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        DIM=dim, ROW=heads * dim, BLOCK=1 << (heads * dim - 1).bit_length(), num_warps=WARPS,
    )  # fmt: skip
