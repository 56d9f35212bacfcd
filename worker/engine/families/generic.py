"""What most families have in common; a family's own file says only what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from visq.errors import EngineError, UnsupportedParameter
from worker.engine.families.base import ImageFeatures, PreparedImage
from worker.engine.families.pictures import PIXELS, PictureProcessor, normalisation_of

ON_HOST: Final = frozenset({"batch_num_images", "image_grid_thw", "image_sizes"})
"""Tensors that transformers reads as Python numbers: on a GPU, every read would wait for it."""


class GenericFamily:
    """A `Family`: one-dimensional positions, pictures joined along the first dimension."""

    def __init__(self, model: Any, processor: Any) -> None:
        """
        :param model: with a language modelling head, as the Auto classes load it.
        :param processor: of a vision-language model; of a text model its tokenizer.
        """
        self._base = model.base_model
        self.image_token_id: int | None = getattr(model.config, "image_token_id", None)
        self.normalisation = None
        self._pictures: PictureProcessor | None = None
        if self.image_token_id is not None:
            self.normalisation = normalisation_of(processor)
            self._pictures = PictureProcessor(processor, self.normalisation)
        self.decoder = model.get_decoder()
        self.lm_head = model.get_output_embeddings()
        self.embed_tokens = model.get_input_embeddings()

    def prepare_image(self, pixels: NDArray[np.uint8]) -> PreparedImage:
        """See `Family.prepare_image`."""
        if self._pictures is None:
            raise UnsupportedParameter("the model takes no images", param="messages")
        return self._pictures.prepare(pixels)

    @torch.no_grad()
    def image_features(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """See `Family.image_features`.

        :raises EngineError: if the model and its processor disagree on the number of tokens.
        """
        if not images:
            return []
        joined = {
            name: self._join([image.tensors[name] for image in images])
            for name in images[0].tensors
        }
        arguments = {
            name: each if name in ON_HOST else self._on_device(each)
            for name, each in (joined | self._derived(joined)).items()
        }
        pixels, dtype = arguments[PIXELS], self.embed_tokens.weight.dtype
        if self.normalisation is None:
            arguments[PIXELS] = pixels.to(dtype)
        else:
            arguments[PIXELS] = self.normalisation.unpack(pixels, dtype)
        made = self._base.get_image_features(**arguments, return_dict=True)
        counts = [image.token_ids.count(self.image_token_id or 0) for image in images]
        embeddings = self._split(made.pooler_output, counts)
        layers = [
            self._split(layer, counts) for layer in getattr(made, "deepstack_features", None) or ()
        ]
        return [
            ImageFeatures(each, tuple(layer[index] for layer in layers))
            for index, each in enumerate(embeddings)
        ]

    def positions(
        self, token_ids: Sequence[int], images: Sequence[PreparedImage]
    ) -> tuple[torch.Tensor, int]:
        """See `Family.positions`: ``(1, T)``, counting from 0."""
        return torch.arange(len(token_ids)).unsqueeze(0), 0

    def decoder_kwargs(
        self, positions: torch.Tensor, visual: Sequence[tuple[slice, ImageFeatures, slice]]
    ) -> dict[str, Any]:
        """See `Family.decoder_kwargs`: ``position_ids`` ``(1, T)``."""
        return {"position_ids": positions}

    def _derived(self, joined: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Further arguments of ``get_image_features``, which follow from those of the processor."""
        return {}

    def _join(self, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """One tensor of those of several pictures, joined along `dim`.

        In the others they are padded with zeros to the longest, as processors do with the tiles of
        pictures of different sizes. In pinned memory on the way to a GPU: only from there it can
        fetch them while the host goes on.
        """
        shape = [max(sizes) for sizes in zip(*(each.shape for each in tensors), strict=True)]
        shape[dim] = sum(each.shape[dim] for each in tensors)
        pinned = self.embed_tokens.weight.is_cuda
        joined = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pinned)
        parts = torch.split(joined, [each.shape[dim] for each in tensors], dim)
        for part, tensor in zip(parts, tensors, strict=True):
            if part.shape != tensor.shape:
                part.zero_()
                part = part[tuple(slice(size) for size in tensor.shape)]
            part.copy_(tensor)
        return joined

    def _on_device(self, argument: Any) -> Any:
        """The argument, where the model is if it is a tensor."""
        weight = self.embed_tokens.weight
        if not isinstance(argument, torch.Tensor):
            return argument
        if weight.is_cuda and not argument.is_pinned():
            argument = argument.pin_memory()
        return argument.to(weight.device, non_blocking=True)

    def _split(self, rows: Any, counts: Sequence[int]) -> list[torch.Tensor]:
        """A tensor ``(count, hidden)`` of its own for each picture.

        :param rows: all pictures' ``(..., hidden)``, or a list of such.
        """
        parts = [rows] if isinstance(rows, torch.Tensor) else rows
        joined = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        if joined.shape[0] != sum(counts):
            raise EngineError(
                f"the model makes {joined.shape[0]} embeddings of pictures for which its processor "
                f"writes {sum(counts)} placeholders; the checkpoint's processor does not fit it"
            )
        weight = self.embed_tokens.weight
        return [
            part.to(weight.device, weight.dtype).clone(memory_format=torch.contiguous_format)
            for part in torch.split(joined, list(counts))
        ]
