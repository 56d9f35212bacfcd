"""Paged attention by torch's ``scaled_dot_product_attention``: any device, any dtype.

Keys and values are gathered from their blocks before each call. This is the reference that other
kernels are held against.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.attention.context import Decodes, Kernels, StepContext


def decode(query: torch.Tensor, layer: int, step: StepContext, scale: float) -> torch.Tensor:
    """See `Kernels.decode`. The heads that share a key head are laid out as if they were tokens, so
    that no key is copied for them."""
    assert step.decodes is not None
    cache = step.cache
    keys, values = cache.layer(layer)
    if step.scratch is None:
        step.scratch = _blocks_and_mask(step.decodes, cache.pages_per_block, cache.block_size)
    blocks, mask = step.scratch
    rows, heads, dim = query.shape
    kv_heads = keys.shape[2]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, dim)
    out = scaled_dot_product_attention(
        grouped,
        keys[blocks].flatten(1, 2).transpose(1, 2),
        values[blocks].flatten(1, 2).transpose(1, 2),
        attn_mask=mask,
        scale=scale,
    )
    return out.reshape(rows, heads, dim)


def _blocks_and_mask(
    decodes: Decodes, pages_per_block: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the blocks ``(B, width)``, and ``(B, 1, 1, width * block_size)`` bool: which of
    their tokens each sequence may see."""
    places = torch.arange(decodes.tables.shape[1] * block_size, device=decodes.tables.device)
    mask = places < decodes.lengths[:, None]
    return decodes.tables.long() // pages_per_block, mask[:, None, None, :]


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    step: StepContext,
    scale: float,
) -> torch.Tensor:
    """See `Kernels.prefill`; one sequence after the other."""
    assert step.prefills is not None
    first = step.prefills.spans[0][0]
    rows = step.prefills.rows
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    at = 0
    for start, end, context in step.prefills.spans:
        new = slice(start - first, end - first)
        if rows is None:
            out[new] = _causal(query[new], key[new], value[new], None, scale)
        else:
            keys, values = step.cache.layer_rows(layer)
            of_context = rows[at : at + context]
            mask = None
            if context > end - start:
                mask = torch.ones(end - start, context, dtype=torch.bool, device=query.device)
                mask = mask.tril(context - (end - start))
            out[new] = _causal(query[new], keys[of_context], values[of_context], mask, scale)
        at += context
    return out


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


KERNELS = Kernels("sdpa", decode, prefill)
