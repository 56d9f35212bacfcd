"""Pixels as bytes, normalised where the model is: the same as the processor's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.worker.engine.families.models import FAMILIES, load
from worker.engine.families import family_of
from worker.engine.families.pictures import (
    TOLERANCE,
    Normalisation,
    PictureProcessor,
    normalisation_of,
)
from worker.engine.families.qwen_vision import VisionLayouts

VISION = [name for name in FAMILIES if name not in {"llama", "mistral", "qwen2", "qwen3"}]
QWEN = [name for name in VISION if name.startswith("qwen")]
SIZES = [(40, 50), (96, 64), (33, 151), (64, 64), (7, 5)]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8)


def own_pixels(processor: Any, pixels: NDArray[np.uint8]) -> torch.Tensor:
    made = processor(
        text=[processor.image_token], images=[Image.fromarray(pixels)], return_tensors="pt"
    )
    own: torch.Tensor = made["pixel_values"]
    return own


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", VISION)
def test_bytes_normalised_later_are_the_processor_s_own_pixels(
    folder_of: Callable[[str], Path], name: str, size: tuple[int, int]
) -> None:
    model, processor = load(folder_of(name))
    family = family_of(model, processor)
    assert family is not None
    assert family.normalisation is not None
    kept = family.prepare_image(noise(*size)).tensors["pixel_values"]
    assert kept.dtype == torch.uint8
    expected = own_pixels(processor, noise(*size))
    made = family.normalisation.unpack(kept, torch.float32)
    assert made.shape == expected.shape
    assert (made - expected).abs().max() <= TOLERANCE
    assert kept.nbytes * (8 if name in QWEN else 4) == expected.nbytes


def test_a_mask_takes_a_byte_a_pixel(folder_of: Callable[[str], Path]) -> None:
    model, processor = load(folder_of("idefics3"))
    family = family_of(model, processor)
    assert family is not None
    tensors = family.prepare_image(noise(40, 90)).tensors
    assert tensors["pixel_attention_mask"].dtype == torch.bool
    assert 3 * tensors["pixel_attention_mask"].nbytes == tensors["pixel_values"].nbytes


class Sharpening:
    """A processor that does something of its own after the normalisation, or only then."""

    def __init__(self, processor: Any, change: Callable[[Any, dict[str, Any]], Any]) -> None:
        self.image_processor = processor.image_processor
        self.image_token = processor.image_token
        self._processor, self._change = processor, change

    def __call__(self, **kwargs: Any) -> Any:
        return self._change(self._processor, kwargs)


def ignores_options(processor: Any, kwargs: dict[str, Any]) -> Any:
    return processor(**{name: each for name, each in kwargs.items() if not name.startswith("do_")})


def refuses_options(processor: Any, kwargs: dict[str, Any]) -> Any:
    if "do_rescale" in kwargs:
        raise TypeError("no such option")
    return processor(**kwargs)


def clamps(processor: Any, kwargs: dict[str, Any]) -> Any:
    made = processor(**kwargs)
    if "do_rescale" not in kwargs:
        made["pixel_values"] = made["pixel_values"].clamp(-1.0, 1.0)
    return made


@pytest.mark.parametrize("change", [ignores_options, refuses_options, clamps])
def test_a_processor_that_does_more_keeps_its_own_floats_and_the_log_says_so(
    folder_of: Callable[[str], Path],
    change: Callable[[Any, dict[str, Any]], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, processor = load(folder_of("internvl"))
    other = Sharpening(processor, change)
    with caplog.at_level(logging.INFO):
        assert normalisation_of(other) is None
    assert len(caplog.records) == 1
    assert "as floats" in caplog.text
    prepared = PictureProcessor(other, None).prepare(noise(40, 50)).tensors["pixel_values"]
    expected = change(processor, {"text": [processor.image_token], "return_tensors": "pt",
                                  "images": [Image.fromarray(noise(40, 50))]})  # fmt: skip
    assert torch.equal(prepared, expected["pixel_values"])


def test_floats_give_the_same_features_as_bytes(folder_of: Callable[[str], Path]) -> None:
    model, processor = load(folder_of("qwen2_5_vl"))
    bytewise = family_of(model, processor)
    own = family_of(model, Sharpening(processor, refuses_options))
    assert bytewise is not None
    assert own is not None
    assert own.normalisation is None
    (expected,) = own.image_features([own.prepare_image(noise(40, 50))])
    (made,) = bytewise.image_features([bytewise.prepare_image(noise(40, 50))])
    assert torch.allclose(made.embeddings, expected.embeddings, atol=1e-4)


def test_half_precision_is_reached_from_float32() -> None:
    normalisation = Normalisation(255.0, (0.48, 0.45, 0.4), (0.26, 0.26, 0.27), 2)
    kept = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 256)
    exact = normalisation.unpack(kept, torch.float32)
    assert torch.equal(normalisation.unpack(kept, torch.bfloat16), exact.to(torch.bfloat16))


@pytest.mark.parametrize("name", QWEN)
def test_the_tower_takes_what_was_computed_on_the_host(
    folder_of: Callable[[str], Path], name: str
) -> None:
    model, processor = load(folder_of(name))
    base = model.base_model
    images = [noise(height, width) for height, width in SIZES[:3]]
    made = processor.image_processor(images=images, return_tensors="pt")
    grids = [(each[0], each[1], each[2]) for each in made["image_grid_thw"].tolist()]
    arguments = VisionLayouts(base.visual).arguments(grids)
    with torch.no_grad():
        expected = torch.cat(base.get_image_features(**made).pooler_output)
        with_them = torch.cat(base.get_image_features(**made, **arguments).pooler_output)
        assert torch.equal(with_them, expected)
        for argument in arguments:
            # The tower would compute it anew if it did not know the name.
            wrong = arguments[argument]
            if isinstance(wrong, torch.Tensor) and "cu_" not in argument:
                altered = {**arguments, argument: wrong.flip(0)}
                other = base.get_image_features(**made, **altered).pooler_output
                assert not torch.allclose(torch.cat(other), expected), argument


def test_sizes_are_computed_once(folder_of: Callable[[str], Path]) -> None:
    model, _ = load(folder_of("qwen2_5_vl"))
    layouts = VisionLayouts(model.base_model.visual)
    layouts.arguments([(1, 4, 6), (1, 6, 4), (1, 4, 6)])
    layouts.arguments([(1, 6, 4)])
    assert layouts._layout.cache_info().misses == 2
