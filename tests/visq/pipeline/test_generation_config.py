"""`GenerationConfig`: LMDeploy's names and defaults, one truth with the JSON form."""

from __future__ import annotations

from typing import Any

import pytest

from visq import types
from visq.pipeline import GenerationConfig
from visq.pipeline.generation import as_config, config_for_each

LMDEPLOY = {
    "n": 1,
    "max_new_tokens": 512,
    "do_sample": False,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": 0.0,
    "temperature": 0.8,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "random_seed": None,
    "stop_words": None,
    "bad_words": None,
    "stop_token_ids": None,
    "bad_token_ids": None,
    "min_new_tokens": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "logprobs": None,
    "response_format": None,
    "logits_processors": None,
    "output_logits": None,
    "include_stop_str_in_output": False,
    "return_ppl": False,
    "repetition_ngram_size": 0,
    "repetition_ngram_threshold": 0,
}
"""Its manual's table, but for the fields that visq refuses."""


def test_names_and_defaults_are_lmdeploys() -> None:
    assert GenerationConfig().model_dump() == LMDEPLOY


def test_the_json_form_has_all_fields_but_the_functions() -> None:
    config = GenerationConfig(top_k=5, stop_words=["."], logits_processors=[max])
    assert config.as_json_form() == types.GenerationConfig(top_k=5, stop_words=["."])
    assert type(config.as_json_form()) is types.GenerationConfig


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 1.5},
        {"temperature": -1},
        {"n": 0},
        {"min_p": 2},
        {"top_q": 1},
        {"output_last_hidden_state": "all"},
        {"with_cache": True},
    ],
)
def test_what_does_not_fit_is_a_value_error_with_its_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        GenerationConfig(**fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        as_config(fields)


def test_fields_that_visq_has_not_may_be_left_at_their_default() -> None:
    given: dict[str, Any] = {"output_last_hidden_state": None, "with_cache": False}
    assert GenerationConfig(**given) == GenerationConfig()


def test_a_field_can_be_set_later_and_is_checked_then() -> None:
    config = GenerationConfig()
    config.top_k = 7
    assert config.as_json_form().top_k == 7
    with pytest.raises(ValueError, match="top_p"):
        config.top_p = 7.0


@pytest.mark.parametrize(("size", "threshold"), [(3, None), (3, 0), (0, 3), (-1, 3)])
def test_half_an_ngram_rule_is_none(size: int, threshold: int | None) -> None:
    fields = {"repetition_ngram_size": size, "repetition_ngram_threshold": threshold}
    given = {name: value for name, value in fields.items() if value is not None}
    config = GenerationConfig(**given)  # type: ignore[arg-type]
    assert (config.repetition_ngram_size, config.repetition_ngram_threshold) == (0, 0)


def test_a_list_of_configs_must_be_as_long_as_the_prompts() -> None:
    first, second = GenerationConfig(top_k=1), types.GenerationConfig(top_k=2)
    assert [c.top_k for c in config_for_each([first, second, {"top_k": 3}], 3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="2 entries for 3 prompts"):
        config_for_each([first, second], 3)
    with pytest.raises(ValueError, match="not int"):
        config_for_each(7, 1)  # type: ignore[arg-type]
