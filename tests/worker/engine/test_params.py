"""What a request's ``gen_config`` means for the sampler, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from visq.errors import InvalidRequest
from visq.types import GenerationConfig
from worker.engine.params import SamplingParams, check, choice_seed, resolve

VOCAB = 100
END = {2, 7}


def params(stop_ids: set[int] = END, **config: Any) -> tuple[SamplingParams, ...]:
    return resolve(GenerationConfig(**config), vocab_size=VOCAB, end_ids=END, stop_ids=stop_ids)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "temperature": 9e-6},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 0.0},
    ],
)
def test_what_leaves_no_choice_is_greedy(config: dict[str, Any]) -> None:
    assert params(**config)[0].greedy


def test_sampling_takes_the_fields_of_the_request() -> None:
    (found,) = params(
        do_sample=True,
        temperature=1.5,
        top_k=1_000_000,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.25,
        random_seed=99,
        logprobs=0,
    )
    assert not found.greedy
    assert (found.temperature, found.top_p, found.min_p) == (1.5, 0.25, 0.125)
    assert found.top_k == VOCAB
    assert found.repetition_penalty == 1.25
    assert (found.seed, found.logprobs) == (99, 0)


def test_the_penalty_counts_under_greedy_decoding_as_well() -> None:
    assert params(do_sample=False, repetition_penalty=1.3)[0].repetition_penalty == 1.3


def test_ignore_eos_bans_the_models_end_tokens_and_leaves_the_requests_own() -> None:
    (found,) = params(
        {50}, ignore_eos=True, bad_token_ids=[9, 9, 4], stop_token_ids=[50], min_new_tokens=3
    )
    assert found.banned_ids == (2, 4, 7, 9)
    assert found.stop_ids == (50,)
    assert found.min_new_tokens == 3


def test_end_tokens_beyond_the_vocabulary_are_left_out() -> None:
    config = GenerationConfig(ignore_eos=True)
    (found,) = resolve(config, vocab_size=VOCAB, end_ids={2, VOCAB}, stop_ids={VOCAB + 1})
    assert (found.banned_ids, found.stop_ids) == ((2,), ())


def test_choices_have_seeds_of_their_own_and_the_first_has_the_requests() -> None:
    seeds = [each.seed for each in params(n=64, random_seed=2**63 - 1)]
    assert seeds[0] == 2**63 - 1
    assert len(set(seeds)) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [each.seed for each in params(n=64, random_seed=2**63 - 1)]
    # Written down: answers to a seed must stay the same over versions of visq.
    assert choice_seed(5, 1) == 4262083132935192689


def test_without_a_seed_every_request_draws_another() -> None:
    assert len({params()[0].seed for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"stop_token_ids": [3, VOCAB]}, "stop_token_ids"),
        ({"bad_token_ids": [VOCAB + 5]}, "bad_token_ids"),
        ({"bad_token_ids": list(range(VOCAB))}, "bad_token_ids"),
        ({"bad_token_ids": sorted(set(range(VOCAB)) - END), "ignore_eos": True}, "bad_token_ids"),
    ],
)
def test_impossible_tokens_are_refused_by_name(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as refused:
        check(GenerationConfig(**config), VOCAB, END)
    assert refused.value.param == f"gen_config.{field}"


def test_more_logprobs_than_tokens_are_refused() -> None:
    check(GenerationConfig(logprobs=10), 10, END)
    with pytest.raises(InvalidRequest, match="logprobs") as refused:
        check(GenerationConfig(logprobs=11), 10, END)
    assert refused.value.param == "gen_config.logprobs"


def test_one_token_that_is_not_bad_is_enough() -> None:
    check(GenerationConfig(bad_token_ids=list(range(VOCAB - 1)), ignore_eos=True), VOCAB, END)
