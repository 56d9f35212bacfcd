"""The one call of transformers' decoder: tokens of many sequences side by side, paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker.engine.attention import StepContext, attending
from worker.engine.families.base import Family, ImageFeatures


def hidden_states(
    family: Family,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    step: StepContext,
    visual: Sequence[tuple[slice, ImageFeatures, slice]] = (),
) -> torch.Tensor:
    """``(T, hidden)``, after the last layer and its norm.

    :param embeddings: ``(T, hidden)``.
    :param positions: ``(axes, T)``.
    :param visual: see `Family.decoder_kwargs`.
    """
    with attending(step):
        hidden: torch.Tensor = family.decoder(
            inputs_embeds=embeddings.unsqueeze(0),
            use_cache=False,
            attention_mask=None,
            visq=step,
            **family.decoder_kwargs(positions, visual),
        ).last_hidden_state[0]
    return hidden
