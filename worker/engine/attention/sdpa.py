"""Paged attention by torch's ``scaled_dot_product_attention``: any device, any dtype.

Keys and values are gathered from their blocks before each call. This is the reference that other
kernels are held against.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.attention.context import Prefill, StepContext


def attend(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: StepContext,
    *,
    scale: float,
) -> torch.Tensor:
    """Write the step's keys and values to the cache, and attend.

    :param query: ``(T, heads, head_dim)``.
    :param key, value: ``(T, kv_heads, head_dim)``.
    :returns: ``(T, heads, head_dim)``.
    """
    keys, values = step.cache.layer(layer)
    keys[step.blocks, step.offsets] = key
    values[step.blocks, step.offsets] = value
    out = torch.empty_like(query)
    if step.decodes:
        out[: step.decodes] = _decode(query[: step.decodes], keys, values, step, scale)
    for prefill in step.prefills:
        new = slice(prefill.start, prefill.end)
        if prefill.context == prefill.end - prefill.start:
            out[new] = _causal(query[new], key[new], value[new], None, scale)
        else:
            out[new] = _continue(query[new], keys, values, prefill, scale)
    return out


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: StepContext,
    scale: float,
) -> torch.Tensor:
    """One token of each sequence. The heads that share a key head are laid out as if they were
    tokens, so that no key is copied for them."""
    rows, heads, dim = query.shape
    kv_heads = keys.shape[2]
    grouped = query.view(rows, kv_heads, heads // kv_heads, dim)
    out = scaled_dot_product_attention(
        grouped,
        keys[step.tables].flatten(1, 2).transpose(1, 2),
        values[step.tables].flatten(1, 2).transpose(1, 2),
        attn_mask=step.mask,
        scale=scale,
    )
    return out.reshape(rows, heads, dim)


def _continue(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefill: Prefill,
    scale: float,
) -> torch.Tensor:
    """New tokens after some that are in the cache already."""
    new, context = query.shape[0], prefill.context
    key = keys[prefill.blocks].flatten(0, 1)[:context]
    value = values[prefill.blocks].flatten(0, 1)[:context]
    mask = torch.ones(new, context, dtype=torch.bool, device=query.device)
    return _causal(query, key, value, mask.tril(context - new), scale)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """``(q, heads, dim)`` over ``(k, kv_heads, dim)``; without a mask both begin together."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    out = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[0].transpose(0, 1)
