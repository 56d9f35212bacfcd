"""Idefics3 and SmolVLM: a picture is a row of tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker.engine.families.generic import GenericFamily


class Idefics3Family(GenericFamily):
    def _join(self, tensors: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
        """The tiles of all pictures as those of one: ``(1, tiles, ...)``.

        All tiles have the same size, so none is padded, and the model need not look which tiles
        are nothing but padding.
        """
        return super()._join(tensors, dim)
