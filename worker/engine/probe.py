"""Tries a model's decoder on paged attention before it is served, on a cache of its own.

What a configuration says of a decoder is looked at in `worker.engine.families`; here the decoder
itself is asked. A layer that computes its attention in its own way would never see the cache, and
answers would be wrong without any error.
"""

from __future__ import annotations

from typing import Final

import torch

from worker.engine.attention import NAME, Decodes, KVCache, Prefills, StepContext
from worker.engine.attention.sdpa import KERNELS
from worker.engine.families.base import Family
from worker.engine.forward import hidden_states
from worker.engine.loading import LoadedModel
from worker.engine.sizes import Shape

TOKENS: Final = 3
"""Two of a prompt, and one that is decoded."""


def refusal(loaded: LoadedModel, family: Family) -> str | None:
    """Why the decoder cannot run on paged attention; ``None``: it can.

    Leaves the model as it was.

    :raises torch.OutOfMemoryError, torch.AcceleratorError: not the decoder is at fault, then.
    """
    shape = Shape.of(loaded)
    context = _context(shape.cache(2, block_size=TOKENS))
    config = family.decoder.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        _run(family, context, loaded.device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # noqa: BLE001  (whatever the model's code makes of our call)
        return f"its decoder does not run on paged attention: {error!r}"
    finally:
        config._attn_implementation = before
    if context.calls != shape.layers:
        return (
            f"its decoder of {shape.layers} layers calls the attention function {context.calls} "
            "times in a step"
        )
    return None


@torch.inference_mode()
def _run(family: Family, context: StepContext, device: torch.device) -> None:
    token_ids = list(range(TOKENS))
    positions, _ = family.positions(token_ids, [])
    embeddings = family.embed_tokens(torch.tensor(token_ids, device=device))
    hidden_states(family, embeddings, positions.to(device), context)


def _context(cache: KVCache) -> StepContext:
    """One sequence decodes its first token into block 0, the prompt of another goes to block 1."""
    device = cache.pool.device
    of_block_1 = cache.rows_per_block
    return StepContext(
        cache,
        KERNELS,
        torch.tensor([0, of_block_1, of_block_1 + 1], device=device),
        Decodes(
            torch.zeros(1, 1, dtype=torch.int32, device=device),
            torch.ones(1, dtype=torch.int32, device=device),
        ),
        Prefills(
            [(1, TOKENS, 2)],
            None,
            torch.tensor([0, 2], dtype=torch.int32, device=device),
            torch.tensor([0, 2], dtype=torch.int32, device=device),
        ),
    )
