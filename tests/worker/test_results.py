"""From an engine's answer to a job's result."""

from __future__ import annotations

import json
import math

import pytest

from worker.engine.face import Choice, Finished
from worker.results import result_of


def test_a_plain_result_has_no_choices_logprobs_tokens_or_perplexity() -> None:
    result = result_of(Finished((Choice("a cat", "stop", [5]),), 3), 0, "small")
    assert (result.choices, result.logprobs, result.token_ids, result.ppl) == (None,) * 4


def test_logprobs_are_by_token_id_in_json() -> None:
    texts = {512: " cat", 7: " dog"}
    choice = Choice("a cat", "stop", [512], logprobs=[{512: -2.5, 7: -0.25}], tokens=texts)
    result = result_of(Finished((choice,), 3), 0, "small")
    said = json.loads(result.model_dump_json())
    assert said["logprobs"] == [{"512": -2.5, "7": -0.25}]
    assert said["tokens"] == {"512": " cat", "7": " dog"}


def test_each_choice_has_its_own_logprobs() -> None:
    choices = tuple(Choice("a", "stop", [n], logprobs=[{n: -0.5}]) for n in (5, 6))
    result = result_of(Finished(choices, 3), 0, "small")
    assert result.choices is not None
    assert [choice.logprobs for choice in result.choices] == [[{5: -0.5}], [{6: -0.5}]]
    assert result.logprobs == [{5: -0.5}]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_perplexity_that_is_no_number_is_left_out(value: float) -> None:
    result = result_of(Finished((Choice("a cat", "stop", [5]),), 3, ppl=value), 0, "small")
    assert result.ppl is None
