"""Every family against the model's own forward, on the processor's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache

from tests.worker.engine.asking import image_part
from tests.worker.engine.families.models import FAMILIES, load, reference, takes_images
from visq.errors import EngineError, ImageError, InvalidRequest
from visq.types import Message, TextPart
from worker.engine.families import family_of
from worker.engine.families.base import Family, ImageFeatures, PreparedImage
from worker.engine.families.generic import GenericFamily
from worker.engine.prompt import expand

TOLERANCE = 1e-4
VISION = [name for name in FAMILIES if name not in {"llama", "mistral", "qwen2", "qwen3"}]
MROPE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SIZES = [(40, 50), (96, 64), (32, 150), (64, 64)]

Picture = NDArray[np.uint8]
Visual = list[tuple[slice, ImageFeatures, slice]]


class _OneSequence:
    """Causal attention over one sequence that comes in chunks: what the engine's attention does."""

    def __init__(self) -> None:
        self.cache = DynamicCache()


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    one_sequence: _OneSequence,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert attention_mask is None
    key, value = one_sequence.cache.update(key, value, module.layer_idx)
    new, past = query.shape[2], key.shape[2] - query.shape[2]
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    scale = kwargs.get("scaling")
    made = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return made.transpose(1, 2), None


AttentionInterface.register("test_one_sequence", _attend)


@contextmanager
def our_attention(model: Any) -> Iterator[_OneSequence]:
    config = model.get_decoder().config
    before, config._attn_implementation = config._attn_implementation, "test_one_sequence"
    try:
        yield _OneSequence()
    finally:
        config._attn_implementation = before


def picture(seed: int, height: int = 40, width: int = 50) -> Picture:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3)).astype(np.uint8)


def pictures(count: int) -> list[Picture]:
    return [picture(index, *SIZES[index % len(SIZES)]) for index in range(count)]


def own_inputs(processor: Any, images: Sequence[Picture]) -> dict[str, torch.Tensor]:
    """What the processor itself makes of a whole prompt with `images`."""
    parts: list[dict[str, str]] = [{"type": "text", "text": "Look:"}]
    for index in range(len(images)):
        parts += [{"type": "image"}, {"type": "text", "text": f" no. {index},\n"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}],
        add_generation_prompt=True,
    )
    options = {"images": [Image.fromarray(image) for image in images]} if images else {}
    inputs = dict(processor(text=[text], return_tensors="pt", **options))
    inputs["unexpanded"] = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    return inputs


def family_for(folder: Path) -> Family:
    family = family_of(*load(folder))
    assert family is not None
    return family


def own_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits ``(T, vocabulary)`` of the model's own forward."""
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs).logits[0]
    return logits


def visual_of(
    family: Family,
    token_ids: Sequence[int],
    features: Sequence[ImageFeatures],
    first: int,
    end: int,
) -> Visual:
    """Which of the tokens ``first`` to ``end`` are which rows, one token at a time."""
    rows = [(each, row) for each in features for row in range(each.embeddings.shape[0])]
    places = [place for place, token in enumerate(token_ids) if token == family.image_token_id]
    return [
        (slice(place - first, place - first + 1), each, slice(row, row + 1))
        for place, (each, row) in zip(places, rows, strict=True)
        if first <= place < end
    ]


def logits_by_parts(
    model: Any,
    family: Family,
    token_ids: Sequence[int],
    images: Sequence[PreparedImage],
    chunk: int | None = None,
) -> torch.Tensor:
    """Logits ``(T, vocabulary)`` by the family's parts, the prompt fed in chunks."""
    features = family.image_features(images)
    positions, _ = family.positions(token_ids, [image.without_pixels() for image in images])
    logits = []
    with our_attention(model) as sequence, torch.inference_mode():
        for first in range(0, len(token_ids), chunk or len(token_ids)):
            end = min(first + (chunk or len(token_ids)), len(token_ids))
            embeddings = family.embed_tokens(torch.tensor(token_ids[first:end])).clone()
            visual = visual_of(family, token_ids, features, first, end)
            for tokens, each, rows in visual:
                embeddings[tokens] = each.embeddings[rows]
            hidden = family.decoder(
                inputs_embeds=embeddings.unsqueeze(0),
                use_cache=False,
                attention_mask=None,
                one_sequence=sequence,
                **family.decoder_kwargs(positions[:, first:end], visual),
            ).last_hidden_state[0]
            logits.append(family.lm_head(hidden))
    return torch.cat(logits)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", VISION)
def test_the_parts_give_the_logits_of_the_model_itself(
    folder_of: Callable[[str], Path], name: str, count: int
) -> None:
    model, processor = load(folder_of(name))
    family = family_for(folder_of(name))
    inputs = own_inputs(processor, pictures(count))
    unexpanded = inputs.pop("unexpanded")[0].tolist()
    images = [family.prepare_image(image) for image in pictures(count)]
    assert family.image_token_id is not None
    token_ids, _ = expand(unexpanded, family.image_token_id, [each.token_ids for each in images])
    assert token_ids == inputs["input_ids"][0].tolist()
    expected = own_logits(model, inputs)
    for chunk in (None, 7):
        made = logits_by_parts(model, family, token_ids, images, chunk)
        assert (made - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_parts_of_a_text_model_give_its_logits(
    folder_of: Callable[[str], Path], name: str
) -> None:
    model, tokenizer = load(folder_of(name))
    family = family_for(folder_of(name))
    assert family.image_token_id is None
    inputs = tokenizer("A text of some length, é 你.", return_tensors="pt")
    expected = own_logits(model, {"input_ids": inputs["input_ids"]})
    made = logits_by_parts(model, family, inputs["input_ids"][0].tolist(), [], 5)
    assert (made - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("name", VISION)
def test_one_placeholder_after_the_other_expands_as_in_the_whole_prompt(
    folder_of: Callable[[str], Path], name: str, count: int
) -> None:
    _, processor = load(folder_of(name))
    family = family_for(folder_of(name))
    images = [picture(index, 20 + 37 * index, 140 - 29 * index) for index in range(count)]
    inputs = own_inputs(processor, images)
    prepared = [family.prepare_image(image) for image in images]
    assert family.image_token_id is not None
    token_ids, spans = expand(
        inputs["unexpanded"][0].tolist(),
        family.image_token_id,
        [each.token_ids for each in prepared],
    )
    assert token_ids == inputs["input_ids"][0].tolist()
    assert [length for _, length in spans] == [len(each.token_ids) for each in prepared]


@pytest.mark.parametrize("name", VISION)
def test_the_features_of_a_picture_do_not_depend_on_its_neighbours(
    folder_of: Callable[[str], Path], name: str
) -> None:
    family = family_for(folder_of(name))
    images = [family.prepare_image(image) for image in pictures(4)]
    together = family.image_features(images)
    for image, of_many in zip(images, together, strict=True):
        (alone,) = family.image_features([image])
        assert torch.allclose(of_many.embeddings, alone.embeddings, atol=TOLERANCE)
        assert len(of_many.deepstack) == len(alone.deepstack)
        for layer, layer_alone in zip(of_many.deepstack, alone.deepstack, strict=True):
            assert torch.allclose(layer, layer_alone, atol=TOLERANCE)
        assert of_many.embeddings.shape[0] == image.token_ids.count(family.image_token_id or -1)


@pytest.mark.parametrize("name", VISION)
def test_features_hold_no_more_memory_than_their_own(
    folder_of: Callable[[str], Path], name: str
) -> None:
    family = family_for(folder_of(name))
    for each in family.image_features([family.prepare_image(image) for image in pictures(3)]):
        for tensor in (each.embeddings, *each.deepstack):
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_no_pictures_have_no_features(folder_of: Callable[[str], Path]) -> None:
    assert family_for(folder_of("internvl")).image_features([]) == []


@pytest.mark.parametrize("name", MROPE)
def test_a_generated_token_stands_where_the_model_itself_puts_it(
    folder_of: Callable[[str], Path], name: str
) -> None:
    model, processor = load(folder_of(name))
    family = family_for(folder_of(name))
    images = [family.prepare_image(image) for image in pictures(3)]
    inputs = own_inputs(processor, pictures(3))
    token_ids = inputs["input_ids"][0].tolist()
    stale = torch.tensor([[1234]])
    model.model.rope_deltas = stale
    positions, delta = family.positions(token_ids, [image.without_pixels() for image in images])
    assert model.model.rope_deltas is stale, "the module's state is left alone"
    model.model.rope_deltas = None
    own_logits(model, {name: each for name, each in inputs.items() if name != "unexpanded"})
    assert delta == int(model.model.rope_deltas)
    assert delta < 0, "a picture takes fewer positions than tokens"
    assert positions.shape == (3, len(token_ids))
    assert not torch.equal(positions[1], positions[2])
    assert positions.max() + 1 == len(token_ids) + delta


@pytest.mark.parametrize("name", MROPE)
def test_a_picture_right_after_another_is_refused(
    folder_of: Callable[[str], Path], name: str
) -> None:
    family = family_for(folder_of(name))
    image = family.prepare_image(picture(1))
    with pytest.raises(InvalidRequest, match="side by side"):
        family.positions([*image.token_ids, *image.token_ids], [image, image])


@pytest.mark.parametrize("name", VISION)
def test_pictures_of_odd_shapes_are_prepared_or_refused(
    folder_of: Callable[[str], Path], name: str
) -> None:
    family = family_for(folder_of(name))
    prepared = 0
    for height, width in ((1, 1), (1, 3), (3, 1), (3, 3), (1, 400), (400, 1), (2, 1000)):
        try:
            image = family.prepare_image(picture(0, height, width))
        except ImageError:
            continue
        (features,) = family.image_features([image])
        assert features.embeddings.shape[0] == image.token_ids.count(family.image_token_id or -1)
        prepared += 1
    assert prepared


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "llava_next", "idefics3"])
def test_pictures_are_prepared_by_many_threads_at_a_time(
    folder_of: Callable[[str], Path], name: str
) -> None:
    family = family_for(folder_of(name))
    images = [picture(seed, *SIZES[seed % 4]) for seed in range(24)]
    alone = [family.prepare_image(image) for image in images]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(family.prepare_image, images))
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


def test_a_processor_that_does_not_fit_the_model_is_found_out(
    folder_of: Callable[[str], Path],
) -> None:
    family = family_for(folder_of("internvl"))
    image = family.prepare_image(picture(1))
    wrong = PreparedImage([*image.token_ids, family.image_token_id or 0], image.tensors)
    with pytest.raises(EngineError, match="does not fit"):
        family.image_features([wrong])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tiny_models_answer_something_that_varies(
    folder_of: Callable[[str], Path], name: str
) -> None:
    folder = folder_of(name)
    answers = [reference(folder, [user("Hello, who are you?", 0)], max_new_tokens=16)]
    if takes_images(folder):
        for seed in range(2):
            images = [picture(seed), picture(7, 96, 64)]
            answers.append(reference(folder, [user("What?", 2)], images, max_new_tokens=16))
        assert answers[1] != answers[2], "another picture, another answer"
    assert all(len(answer) == 16 and len(set(answer)) >= 8 for answer in answers)


def user(text: str, images: int) -> Message:
    return Message(
        role="user", content=[*(image_part() for _ in range(images)), TextPart(text=text)]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tiny_model_has_a_family(folder_of: Callable[[str], Path], name: str) -> None:
    assert isinstance(family_of(*load(folder_of(name))), GenericFamily)
