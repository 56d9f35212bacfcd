"""The names under which transformers' layers find our attention, and what we refuse to compute.

A decoder layer calls `attention`. It is split in two, so that `torch.compile` can make one piece of
code of a layer: what is traced writes keys and values to the cache; ``visq::attend``, an operator
that is not looked into, computes. The operator finds the step by `attending`, not by an argument:
code that was compiled for one step serves all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from worker.engine.attention import flash
from worker.engine.attention.context import StepContext
from worker.engine.attention.store import store

NAME: Final = "visq_paged"
"""``config._attn_implementation`` of a decoder that is served. No mask function is registered
under it, so transformers builds no masks."""

VISION_NAME: Final = "visq_flash_varlen"
"""The same for vision towers that see pictures of many sizes in one batch. Only if the name has
"flash" in it, Qwen's towers call it once for all of them."""

_HARMLESS: Final = frozenset(
    {"dropout", "position_ids", "use_cache", "is_causal", "output_attentions"}
)


class UnsupportedAttention(Exception):  # noqa: N818  # named after what is the case
    """The model's attention has a feature that would be computed wrongly."""


class _Current(threading.local):
    """Of each thread, since each engine in a process has one of its own."""

    step: StepContext | None = None


_current = _Current()


@contextmanager
def attending(step: StepContext) -> Iterator[None]:
    """Inside, the decoder's layers that this thread runs attend as `step` says."""
    before, _current.step = _current.step, step
    try:
        yield
    finally:
        _current.step = before


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    out = torch.ops.visq.attend(query[0].transpose(0, 1), keys, values, visq.cache.rows, scale)
    return out.unsqueeze(0), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pool: torch.Tensor, scale: float
) -> torch.Tensor:
    """Write the step's keys and values to the cache, and attend.

    :param query: ``(T, heads, head_dim)``.
    :param key, value: ``(T, kv_heads, head_dim)``.
    :param pool: `KVCache.rows`, named so that whoever reorders operators knows what is changed.
    :returns: ``(T, heads, head_dim)``.
    """
    step = _current.step
    assert step is not None
    layer = step.calls
    step.calls += 1
    keys, values = step.cache.layer_rows(layer)
    store(key, value, keys, values, step.rows)
    kernels = step.kernels
    if step.prefills is None:
        return kernels.decode(query, layer, step, scale)
    if step.decodes is None:
        return kernels.prefill(query, key, value, layer, step, scale)
    count = step.decodes.count
    decoded = kernels.decode(query[:count], layer, step, scale)
    new = slice(count, None)
    return torch.cat(
        (decoded, kernels.prefill(query[new], key[new], value[new], layer, step, scale))
    )


def vision_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a vision tower inside each picture or window: shapes as in `attention`."""
    if attention_mask is not None or cu_seq_lens_q is None or max_length_q is None:
        raise UnsupportedAttention("vision attention without lengths")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.ops.visq.attend_within(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        int(max_length_q),
        scale,
    )
    return out.unsqueeze(0), None


def _attend_within(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_lengths: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """``(T, heads, head_dim)`` of pictures side by side, each of which sees itself alone."""
    if flash.supports(query.shape[-1], query.dtype, query.device):
        return flash.varlen(
            query, key, value, cu_lengths, cu_lengths, longest, longest, scale, causal=False
        )
    lengths = (cu_lengths[1:] - cu_lengths[:-1]).tolist()
    heads_first = [torch.split(each.transpose(0, 1), lengths, 1) for each in (query, key, value)]
    parts = [
        scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
        for q, k, v in zip(*heads_first, strict=True)
    ]
    return torch.cat(parts, dim=1).transpose(0, 1).contiguous()


def _register() -> None:
    # By a `Library` and not by `torch.library.custom_op`, which costs the host 20 us a call more.
    make: Any = torch.library.Library
    library = make("visq", "DEF")
    library.define(
        "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) pool, float scale) -> Tensor"
    )
    library.define(
        "attend_within(Tensor query, Tensor key, Tensor value, Tensor cu_lengths, SymInt longest, "
        "float scale) -> Tensor"
    )
    library.impl("attend", _attend, "CompositeExplicitAutograd")
    library.impl("attend_within", _attend_within, "CompositeExplicitAutograd")
    for name in ("attend", "attend_within"):
        register_fake: Any = torch.library.register_fake
        register_fake(f"visq::{name}", lambda query, *_: query.new_empty(query.shape), lib=library)
    _libraries.append(library)


_libraries: list[Any] = []
"""They live as long as their operators."""

_register()
AttentionInterface.register(NAME, attention)
AttentionInterface.register(VISION_NAME, vision_attention)
