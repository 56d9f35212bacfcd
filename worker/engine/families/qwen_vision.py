"""What Qwen's vision towers derive of the sizes of pictures, computed on the host and remembered.

Left to themselves, the towers compute it on the device, and read it back: which rows are a window,
how long the longest picture is. Each reading makes the host wait for all that the device has to do.
transformers takes it from the caller as well (`accepts_precomputed_kwargs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias

import torch
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

Grid: TypeAlias = tuple[int, int, int]
"""Frames, rows and columns of a picture's patches."""

REMEMBERED: Final = 64
"""Sizes of pictures; a picture of 1024 patches takes 80 KB."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Of one picture, on the CPU."""

    per_patch: dict[str, torch.Tensor]
    """By the name of the tower's argument: a row for each patch."""
    lengths: torch.Tensor
    """Patches that see each other: those of a frame."""
    window_index: torch.Tensor | None = None
    """Order of the merged patches in which those of a window stand together."""
    window_lengths: torch.Tensor | None = None


class VisionLayouts:
    """What a vision tower takes beside pixels. Thread-safe."""

    def __init__(self, visual: Any) -> None:
        """:param visual: the tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""
        self._visual = visual
        self._layout = lru_cache(REMEMBERED)(self._layout_of)

    def arguments(self, grids: Sequence[Grid]) -> dict[str, torch.Tensor | int]:
        """Arguments of ``get_image_features`` for pictures side by side: numbers, and tensors on
        the CPU, to be brought to the tower's device."""
        layouts = [self._layout(grid) for grid in grids]
        made: dict[str, torch.Tensor | int] = {
            name: torch.cat([layout.per_patch[name] for layout in layouts])
            for name in layouts[0].per_patch
        }
        lengths = torch.cat([layout.lengths for layout in layouts])
        made |= {"image_cu_seqlens": _ends(lengths), "image_max_seqlen": int(lengths.max())}
        indices, first = [], 0
        for layout in layouts:
            if layout.window_index is not None:
                indices.append(layout.window_index + first)
                first += len(layout.window_index)
        if indices:
            lengths = torch.cat([each.window_lengths for each in layouts])  # type: ignore[misc]
            made |= {
                "image_window_index": torch.cat(indices),
                "image_cu_window_seqlens": _ends(lengths),
                "image_max_window_seqlen": int(lengths.max()),
            }
        return made

    def _layout_of(self, grid: Grid) -> _Layout:
        visual, grid_thw = self._visual, torch.tensor([grid])
        merge = visual.spatial_merge_size
        lengths = torch.full((grid[0],), grid[1] * grid[2])
        per_patch = {"image_position_ids": get_vision_position_ids(grid_thw, merge)}
        if hasattr(visual, "num_grid_per_side"):  # Qwen3-VL
            indices, weights = get_vision_interpolation_indices_and_weights(
                grid_thw,
                num_grid_per_side=visual.num_grid_per_side,
                mode=visual.interpolation_mode,
                align_corners=visual.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            per_patch |= {"image_interp_indices": indices, "image_interp_weights": weights}
        if not hasattr(visual, "window_size"):
            return _Layout(per_patch, lengths)
        index, ends = get_vision_window_index(  # Qwen2.5-VL
            grid_thw,
            spatial_merge_size=merge,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        return _Layout(per_patch, lengths, index, ends.diff())


def _ends(lengths: torch.Tensor) -> torch.Tensor:
    """Where each stretch begins, and the last one ends: int32, as kernels take it."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
