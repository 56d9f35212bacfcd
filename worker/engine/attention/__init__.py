"""Attention over paged keys and values, called by transformers' own decoder layers.

`StepContext` says where the tokens of one step stand; `sdpa.attend` computes. A decoder whose
``_attn_implementation`` is `NAME` calls us once a layer, with the context among its kwargs.
"""

from __future__ import annotations

from worker.engine.attention.cache import KVCache
from worker.engine.attention.context import Prefill, StepContext
from worker.engine.attention.registered import NAME, UnsupportedAttention

__all__ = ["NAME", "KVCache", "Prefill", "StepContext", "UnsupportedAttention"]
