"""Attention over paged keys and values, called by transformers' own decoder layers.

`StepContext` says where the tokens of one step stand; its `Kernels` compute (`sdpa`, `splitk`,
`flash`; `ladder` chooses). A decoder whose ``_attn_implementation`` is `NAME` calls us once a
layer, with the context among its kwargs.
"""

from __future__ import annotations

from worker.engine.attention.cache import KVCache
from worker.engine.attention.context import Decodes, Kernels, Prefills, StepContext
from worker.engine.attention.ladder import choose
from worker.engine.attention.registered import (
    NAME,
    VISION_NAME,
    UnsupportedAttention,
    attending,
)

__all__ = [
    "NAME",
    "VISION_NAME",
    "Decodes",
    "KVCache",
    "Kernels",
    "Prefills",
    "StepContext",
    "UnsupportedAttention",
    "attending",
    "choose",
]
