"""A picture as the model's own processor prepares it; its pixels as bytes, where that is the same.

A processor ends with ``(pixel / 255 - mean) / std`` in float32: four times the bytes, and a good
part of the time. Where it does the same without, that step is left to the model's device
(`Normalisation`). Whether it does is tried out, on noise, when a model is loaded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from visq.errors import ImageError
from worker.engine.families.base import PreparedImage

logger = logging.getLogger(__name__)

PIXELS: Final = "pixel_values"

OF_TEXT: Final = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
"""What a processor makes of text; the rest are tensors of the picture."""

TRIALS: Final = ((31, 190), (90, 400))
"""Height and width of the pictures that a processor is tried with: they are enlarged, padded and
cut into tiles. Wide, since some processors make many tiles of every picture, fewest of these."""

TOLERANCE: Final = 1e-5
"""Greatest difference of a normalised pixel; they go to about 3, in float32."""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What is left to do with pixels that are kept as bytes.

    ::

        processor's own                       kept (uint8)
        (..., channels, height, width)        the same
        (patches, channels * frames * size)   (patches, channels, size): all frames are the same
    """

    divisor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int
    """How often a patch of Qwen's repeats its picture, since a picture is a film that stands."""

    @classmethod
    def of(cls, image_processor: Any) -> Normalisation:
        """By the processor's own word.

        :raises Exception: if it does not say what it does in the way of transformers.
        """
        scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        mean, std = [0.0] * 3, [1.0] * 3
        if image_processor.do_normalize:
            mean, std = image_processor.image_mean, image_processor.image_std
        if len(mean) != len(std):
            raise ValueError(f"{len(mean)} means, but {len(std)} deviations")
        frames = getattr(image_processor, "temporal_patch_size", 1)
        return cls(1.0 / scale, tuple(mean), tuple(std), int(frames))

    def fused(self) -> Normalisation:
        """The same in fewer steps, and so rounded otherwise: as torchvision's processors do it."""
        mean, std = (torch.tensor(each) * self.divisor for each in (self.mean, self.std))
        return Normalisation(1.0, tuple(mean.tolist()), tuple(std.tolist()), self.frames)

    def pack(self, pixels: torch.Tensor) -> torch.Tensor:
        """What is kept of pixels that are not normalised."""
        if pixels.dim() == 2:
            pixels = pixels.view(len(pixels), len(self.mean), self.frames, -1)[:, :, 0]
        return pixels.to(torch.uint8).contiguous()

    def unpack(self, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The processor's own pixels, computed in float32 where `kept` is."""
        patches = kept.dim() == 3
        made = kept.to(torch.float32)
        if self.divisor != 1.0:
            made.div_(self.divisor)
        # By numbers and not by tensors: those would first have to go to the device.
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            made.select(1 if patches else -3, channel).sub_(mean).div_(std)
        made = made.to(dtype)
        if patches:
            made = made.unsqueeze(2).expand(-1, -1, self.frames, -1).flatten(1)
        return made


class PictureProcessor:
    """Prepares pictures for one model, one at a time. Thread-safe; needs no model."""

    def __init__(self, processor: Any, normalisation: Normalisation | None) -> None:
        """
        :param processor: of a vision-language model.
        :param normalisation: of `normalisation_of`; ``None``: pixels are the processor's own.
        """
        self._processor = processor
        self._normalisation = normalisation
        self._options = (
            {} if normalisation is None else {"do_rescale": False, "do_normalize": False}
        )

    def prepare(self, pixels: NDArray[np.uint8]) -> PreparedImage:
        """What the processor makes of one placeholder and this picture.

        :param pixels: RGB, (height, width, 3).
        :raises ImageError: if the processor refuses the picture.
        """
        try:
            made = self._processor(
                text=[self._processor.image_token],
                images=[Image.fromarray(pixels)],
                add_special_tokens=False,
                return_tensors="pt",
                **self._options,
            )
        except (ArithmeticError, ValueError) as error:
            height, width = pixels.shape[:2]
            raise ImageError(
                f"the model's image processor refuses a picture of {width}x{height} pixels: {error}"
            ) from error
        return PreparedImage(
            token_ids=made["input_ids"][0].tolist(),
            tensors={
                name: self._kept(name, each) for name, each in made.items() if name not in OF_TEXT
            },
        )

    def _kept(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == PIXELS and self._normalisation is not None:
            return self._normalisation.pack(tensor)
        # (A number of 8 bytes for each pixel, otherwise.)
        return tensor.bool() if name.endswith("_mask") else tensor


def normalisation_of(processor: Any) -> Normalisation | None:
    """What makes the processor's own pixels of bytes; ``None``, with the reason in the log, if
    nothing does.

    :param processor: of a vision-language model.
    """
    try:
        plain = Normalisation.of(processor.image_processor)
        own, bytewise = PictureProcessor(processor, None), PictureProcessor(processor, plain)
        trials = [(own.prepare(noise), bytewise.prepare(noise)) for noise in map(_noise, TRIALS)]
        difference, _, normalisation = min(
            (max(_difference(each, *trial) for trial in trials), order, each)
            for order, each in enumerate((plain, plain.fused()))
        )
    except Exception as error:  # noqa: BLE001  (whatever a processor's own code makes of our call)
        reason = repr(error)
    else:
        if difference <= TOLERANCE:
            return normalisation
        reason = f"normalising them later differs by {difference:.2g}"
    logger.info(
        "the pictures of %s go to the model as floats, not as bytes: %s",
        type(processor.image_processor).__name__,
        reason,
    )
    return None


def _noise(size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(size).integers(0, 256, (*size, 3)).astype(np.uint8)


def _difference(normalisation: Normalisation, own: PreparedImage, kept: PreparedImage) -> float:
    """How far the two are apart."""
    pixels = own.tensors[PIXELS]
    made = normalisation.unpack(kept.tensors[PIXELS], pixels.dtype)
    if kept.token_ids != own.token_ids or made.shape != pixels.shape:
        return float("inf")
    return float((made - pixels).abs().max())
