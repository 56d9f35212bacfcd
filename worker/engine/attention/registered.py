"""The name under which transformers' layers find our attention, and what we refuse to compute."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import AttentionInterface

from worker.engine.attention import sdpa
from worker.engine.attention.context import StepContext

NAME: Final = "visq_paged"
"""``config._attn_implementation`` of a decoder that is served. No mask function is registered
under it, so transformers builds no masks."""

_HARMLESS: Final = frozenset(
    {"dropout", "position_ids", "use_cache", "is_causal", "output_attentions"}
)


class UnsupportedAttention(Exception):  # noqa: N818  # named after what is the case
    """The model's attention has a feature that would be computed wrongly."""


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    visq: StepContext,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: ``(1, heads, T, head_dim)`` to ``(1, T, heads, head_dim)``.

    :raises UnsupportedAttention: on an argument that means something we do not compute.
    """
    if attention_mask is not None:
        raise UnsupportedAttention("an attention mask")
    for name, argument in kwargs.items():
        if argument is not None and name not in _HARMLESS:
            raise UnsupportedAttention(f"{name}={argument!r}")
    layer = module.layer_idx
    visq.calls += 1
    out = sdpa.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        visq,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, attention)
