"""What differs between model families: how pictures become embeddings, and where tokens stand.

A family is one small file beside this one. The engine (`worker.engine.runner`) knows only this
face: everything else of a model is transformers' own, unmodified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from worker.engine.families.pictures import Normalisation


@dataclass(frozen=True, slots=True, weakref_slot=True)
class PreparedImage:
    """A picture as the model's own image processor prepares it, on the CPU.

    Its pixels are bytes where the rest can be left to the model's device (`Family.normalisation`).
    Its tensors may be views of shared memory, which is given back when nobody refers to them.
    """

    token_ids: list[int]
    """The tokens that stand for it in the prompt, in place of one placeholder."""
    tensors: Mapping[str, torch.Tensor]
    """What the vision part takes (``pixel_values``, ``image_grid_thw``, ...), for this one picture.
    Where the processor has a batch dimension, it is 1."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def without_pixels(self) -> PreparedImage:
        """What depends on the picture's size only: enough for `Family.positions`."""
        grids = {
            name: each.clone()  # a view would keep the memory of the pixels
            for name, each in self.tensors.items()
            if not name.startswith("pixel")
        }
        return PreparedImage(self.token_ids, grids)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """A picture as the decoder takes it, on the model's device and in its dtype."""

    embeddings: torch.Tensor
    """``(tokens, hidden)``: one row for each placeholder token (``image_token_id``) among
    `PreparedImage.token_ids`, in order. Contiguous, and not a view of a larger tensor: caching one
    picture must not keep its batch alive."""
    deepstack: tuple[torch.Tensor, ...] = ()
    """Of Qwen3-VL: for each of the first decoder layers, ``(tokens, hidden)`` to add there."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.embeddings, *self.deepstack))


class Family(Protocol):
    """How the engine talks to one loaded model."""

    image_token_id: int | None
    """The placeholder whose embeddings are replaced; ``None``: the model takes no pictures."""

    normalisation: Normalisation | None
    """What `image_features` does with the pixels of `prepare_image`; ``None``: nothing, they are
    the processor's own."""

    decoder: Any
    """The text model: ``decoder(inputs_embeds=(1, T, hidden), position_ids=..., use_cache=False,
    **kwargs).last_hidden_state`` is ``(1, T, hidden)``, and ``kwargs`` reach the attention."""

    lm_head: Any
    """``(rows, hidden)`` to logits ``(rows, vocabulary)``."""

    embed_tokens: Any
    """``(T,)`` token ids to ``(T, hidden)``, scaled as the decoder expects it."""

    def prepare_image(self, pixels: NDArray[np.uint8]) -> PreparedImage:
        """From RGB, (height, width, 3). Thread-safe; needs no GPU.

        :raises ImageError: if the image processor refuses the picture.
        """

    def image_features(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Encode pictures, of different sizes, in one batch where the model allows it.

        The result of a picture does not depend on its neighbours (but for rounding).
        """

    def positions(
        self, token_ids: Sequence[int], images: Sequence[PreparedImage]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a whole prompt, on the CPU.

        :param token_ids: with every placeholder replaced by the `PreparedImage.token_ids`.
        :param images: in order; they may be `PreparedImage.without_pixels`.
        :returns: ``(axes, T)`` of int64, ``axes`` being 1, or 3 for M-RoPE; and the delta: a
            generated token at index ``t`` of the sequence stands at position ``t + delta`` on all
            axes.
        """

    def decoder_kwargs(
        self, positions: torch.Tensor, visual: Sequence[tuple[slice, ImageFeatures, slice]]
    ) -> dict[str, Any]:
        """What the decoder is called with beside the embeddings.

        :param positions: ``(axes, T)`` of the step's T tokens, on the device.
        :param visual: which tokens of the step are which rows of which picture's features. They
            are scattered into the embeddings already; deepstack features are this method's.
        :returns: ``position_ids`` in the decoder's shape, and whatever else it needs.
        """
