"""The floors beside measured figures: for known models they are what was worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import model
from bench.floor import Ceilings, Costs, Floor

H100 = Ceilings(bytes_per_second=3.0e12, flops=790e12)
PATCHES = 1024
"""Of a picture of 448 x 448 pixels."""


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Floor:
    """Of the 3B model, from its configuration alone."""
    folder = tmp_path_factory.mktemp("model")
    shape = model.SHAPES["3b"]
    tokenizer = model._tokenizer(model.SHAPES["tiny"].text_tokens)
    (folder / "config.json").write_text(json.dumps(model._config(shape, tokenizer)))
    return Floor(Costs.of(model.skeleton(folder)), H100)


def test_a_decode_step_reads_every_weight_once_and_the_cache_of_every_sequence(
    floor: Floor,
) -> None:
    assert floor.costs.weight_bytes == pytest.approx(6.172e9, rel=1e-3)
    assert floor.costs.kv_bytes == 36_864
    assert floor.step(1, 0) == pytest.approx(2.06e-3, rel=5e-3)
    assert floor.step(64, 373) == pytest.approx(2.35e-3, rel=5e-3)
    assert floor.step(256, 373) == pytest.approx(3.23e-3, rel=5e-3)


def test_vision_and_prefill_are_bound_by_operations(floor: Floor) -> None:
    assert floor.costs.vision_flops(PATCHES) == pytest.approx(1.343e12, rel=1e-3)
    assert 256 * floor.costs.prefill_flops(309) == pytest.approx(442.8e12, rel=1e-3)


def test_whole_jobs_add_their_phases_up(floor: Floor) -> None:
    images = floor.job(256, 309, 128, images=1, patches=PATCHES)
    assert 256 / images == pytest.approx(182, rel=5e-3)
    assert floor.job(64, 531, 256) == pytest.approx(0.90, rel=1e-2)


def test_cached_tokens_are_read_and_not_computed(floor: Floor) -> None:
    full, rest = floor.prefill(1, 3600), floor.prefill(1, 100, cached=3500)
    assert rest == pytest.approx(floor.step(1, 3500), rel=1e-6)
    assert full > 10 * rest


def test_a_word_is_a_token_in_the_model_that_is_built(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = model.build("tiny", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(f" {word}" for word in model.WORDS)
    assert len(tokenizer(text)["input_ids"]) == len(model.WORDS)
    turn = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    # (19: with them the 512 words of the published figures are 531 tokens.)
    assert len(tokenizer(prompt)["input_ids"]) == len(model.WORDS) + 19
