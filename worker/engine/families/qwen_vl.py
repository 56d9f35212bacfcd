"""Qwen2-VL and Qwen2.5-VL: positions on three axes (M-RoPE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visq.errors import InvalidRequest
from worker.engine.attention import VISION_NAME
from worker.engine.families.base import ImageFeatures, PreparedImage
from worker.engine.families.generic import GenericFamily
from worker.engine.families.qwen_vision import VisionLayouts


class QwenVLFamily(GenericFamily):
    def __init__(self, model: Any, processor: Any) -> None:
        """See `GenericFamily`."""
        super().__init__(model, processor)
        # One call for all pictures and windows, where transformers' own makes one for each.
        self._base.visual.config._attn_implementation = VISION_NAME
        self._layouts = VisionLayouts(self._base.visual)

    def positions(
        self, token_ids: Sequence[int], images: Sequence[PreparedImage]
    ) -> tuple[torch.Tensor, int]:
        """See `Family.positions`: ``(3, T)``: time, height, width (arXiv 2409.12191, 2.1).

        :raises InvalidRequest: if two pictures adjoin.
        """
        if not images:
            positions, delta = super().positions(token_ids, images)
            return positions.expand(3, -1), delta
        ids = torch.tensor([list(token_ids)])
        assert self.image_token_id is not None
        is_image = torch.eq(ids, self.image_token_id)
        starts = is_image[0].clone()
        starts[1:] &= ~is_image[0, :-1]
        if int(starts.sum()) != len(images):
            # The model's function would take the two for one. (Chat templates set each picture
            # between two tokens of their own.)
            raise InvalidRequest(
                "two images of the raw prompt stand side by side; this model needs something "
                "between them, as in <|vision_start|><|image_pad|><|vision_end|>",
                param="prompt",
            )
        # The module's `rope_deltas`, which `forward` keeps for its next call, is not touched.
        positions, deltas = self._base.get_rope_index(
            ids,
            mm_token_type_ids=is_image.int(),
            image_grid_thw=torch.cat([image.tensors["image_grid_thw"] for image in images]),
        )
        return positions[:, 0], int(deltas.reshape(-1)[0])

    def _derived(self, joined: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What the tower would have to read back from the GPU."""
        grids = joined["image_grid_thw"].tolist()
        return self._layouts.arguments([(frames, rows, columns) for frames, rows, columns in grids])

    def decoder_kwargs(
        self, positions: torch.Tensor, visual: Sequence[tuple[slice, ImageFeatures, slice]]
    ) -> dict[str, Any]:
        """See `Family.decoder_kwargs`: ``position_ids`` ``(3, 1, T)``."""
        return {"position_ids": positions.unsqueeze(1)}
