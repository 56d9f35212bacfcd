"""FlashAttention-2 over sequences of many lengths in one call, on CUDA in half precision.

It is the kernel in torch that xformers' ``fmha.flash`` runs, called without xformers' wrapper: a
call costs the host 18 us so, and 123 us through it, and a prompt takes one for each layer
(docs/decisions/010-attention-on-cuda.md).
"""

from __future__ import annotations

from typing import Final

import torch

from worker.engine.attention.context import StepContext

DTYPES: Final = frozenset({torch.float16, torch.bfloat16})


def supports(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel exists for this."""
    return (
        device.type == "cuda"
        and dtype in DTYPES
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    step: StepContext,
    scale: float,
) -> torch.Tensor:
    """See `Kernels.prefill`. The kernel knows no pages: contexts are gathered first."""
    prefills = step.prefills
    assert prefills is not None
    if prefills.rows is not None:
        keys, values = step.cache.layer_rows(layer)
        key, value = keys.index_select(0, prefills.rows), values.index_select(0, prefills.rows)
    # With more keys than queries, the last query sees the last key.
    return varlen(
        query, key, value, prefills.cu_new, prefills.cu_context,
        prefills.max_new, prefills.max_context, scale, causal=True,
    )  # fmt: skip


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_query: torch.Tensor,
    cu_key: torch.Tensor,
    max_query: int,
    max_key: int,
    scale: float,
    *,
    causal: bool,
) -> torch.Tensor:
    """Attention inside each of n sequences that lie side by side.

    :param query: ``(T, heads, head_dim)``.
    :param key, value: ``(K, kv_heads, head_dim)``.
    :param cu_query, cu_key: ``(n + 1,)`` int32, sums of lengths from 0 to T and to K.
    :returns: ``(T, heads, head_dim)``.
    """
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_query, cu_key, max_query, max_key, 0.0, causal, False, scale=scale
    )[0]
    return out
