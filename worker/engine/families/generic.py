"""What most families have in common; a family's own file says only what differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from visq.errors import EngineError, ImageError
from worker.engine.families.base import ImageFeatures, PreparedImage

OF_TEXT: Final = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
"""What a processor makes of text; the rest are tensors of the picture."""

ON_HOST: Final = frozenset({"image_sizes", "batch_num_images"})
"""Tensors that transformers reads as Python numbers: on a GPU, every read would wait for it."""


class GenericFamily:
    """A `Family`: one-dimensional positions, pictures joined along the first dimension."""

    def __init__(self, model: Any, processor: Any) -> None:
        """
        :param model: with a language modelling head, as the Auto classes load it.
        :param processor: of a vision-language model; of a text model its tokenizer.
        """
        self._processor = processor
        self._base = model.base_model
        self.image_token_id: int | None = getattr(model.config, "image_token_id", None)
        self.decoder = model.get_decoder()
        self.lm_head = model.get_output_embeddings()
        self.embed_tokens = model.get_input_embeddings()

    def prepare_image(self, pixels: NDArray[np.uint8]) -> PreparedImage:
        """See `Family.prepare_image`: what the model's own processor makes of one placeholder."""
        try:
            made = self._processor(
                text=[self._processor.image_token],
                images=[Image.fromarray(pixels)],
                add_special_tokens=False,
                return_tensors="pt",
            )
        except (ArithmeticError, ValueError) as error:
            height, width = pixels.shape[:2]
            raise ImageError(
                f"the model's image processor refuses a picture of {width}x{height} pixels: {error}"
            ) from error
        return PreparedImage(
            token_ids=made["input_ids"][0].tolist(),
            tensors={name: each for name, each in made.items() if name not in OF_TEXT},
        )

    @torch.no_grad()
    def image_features(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """See `Family.image_features`.

        :raises EngineError: if the model and its processor disagree on the number of tokens.
        """
        if not images:
            return []
        tensors = {
            name: self._on_device(name, self._join([image.tensors[name] for image in images]))
            for name in images[0].tensors
        }
        made = self._base.get_image_features(**tensors, return_dict=True)
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

    def _join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor of those of several pictures, joined along the first dimension.

        The others are padded with zeros to the longest, as processors do with the tiles of
        pictures of different sizes.
        """
        sizes = [
            max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)
        ]
        padded = []
        for tensor in tensors:
            missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
            pad = [amount for each in reversed(missing) for amount in (0, each)]
            padded.append(torch.nn.functional.pad(tensor, pad) if any(missing) else tensor)
        return torch.cat(padded)

    def _on_device(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in ON_HOST:
            return tensor
        weight = self.embed_tokens.weight
        dtype = weight.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(weight.device, dtype, non_blocking=True)

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
