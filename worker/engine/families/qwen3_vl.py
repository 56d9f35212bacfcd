"""Qwen3-VL: M-RoPE, and DeepStack: features of pictures added after the first decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from worker.engine.families.base import ImageFeatures
from worker.engine.families.qwen_vl import QwenVLFamily


class Qwen3VLFamily(QwenVLFamily):
    def decoder_kwargs(
        self, positions: torch.Tensor, visual: Sequence[tuple[slice, ImageFeatures, slice]]
    ) -> dict[str, Any]:
        """See `Family.decoder_kwargs`: also ``visual_pos_masks`` ``(1, T)``, true where a picture
        is, and ``deepstack_visual_embeds``: for each of the first layers, the rows to add there
        (arXiv 2406.04334). Only in steps that show a picture: the mask makes the host wait.
        """
        kwargs = super().decoder_kwargs(positions, visual)
        if not visual:
            return kwargs
        mask = torch.zeros((1, positions.shape[1]), dtype=torch.bool)
        for tokens, _, _ in visual:
            mask[0, tokens] = True
        in_order = sorted(visual, key=lambda each: each[0].start)
        layers = zip(
            *([layer[rows] for layer in features.deepstack] for _, features, rows in in_order),
            strict=True,
        )
        return {
            **kwargs,
            "visual_pos_masks": mask.to(positions.device, non_blocking=True),
            "deepstack_visual_embeds": [torch.cat(layer) for layer in layers],
        }
