"""Every field of ``gen_config`` that only the native engine honours, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker.engine.asking import ask, failed, finished
from visq.errors import InvalidRequest
from visq.pixels import PixelBuffer
from visq.token_text import bytes_of
from worker.engine.config import EngineConfig
from worker.engine.face import EngineRequest, TokenEvent
from worker.engine.native import NativeEngine
from worker.engine.opening import open_engine

SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def engine(text_model: Path) -> Iterator[NativeEngine]:
    engine = open_engine(EngineConfig(engine="native", model=str(text_model), device="cpu"))
    assert isinstance(engine, NativeEngine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain_logits(text_model: Path) -> Callable[[EngineRequest, list[int]], np.ndarray]:
    """``(tokens, vocabulary)``: the logits after each token of a prompt and its answer."""
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    model = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32).eval()

    def logits(request: EngineRequest, answer: list[int]) -> np.ndarray:
        text = tokenizer.apply_chat_template(
            [
                {"role": m.role, "content": "".join(p.text for p in m.parts())}
                for m in request.messages
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        ids = tokenizer(text)["input_ids"] + answer
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].numpy()

    return logits


def test_n_choices_are_each_their_own_and_seeded(engine: NativeEngine) -> None:
    request = ask(n=4, random_seed=7, **SAMPLED)
    *deltas, answer = list(engine.submit(request))
    again = finished(engine.submit(request).result())
    alone = finished(engine.submit(ask(random_seed=7, **SAMPLED)).result())
    answer = finished(answer)  # type: ignore[arg-type]
    assert [c.token_ids for c in answer.choices] == [c.token_ids for c in again.choices]
    assert len({tuple(choice.token_ids) for choice in answer.choices}) == 4
    assert answer.choices[0].token_ids == alone.token_ids
    for index, choice in enumerate(answer.choices):
        events = [e for e in deltas if isinstance(e, TokenEvent) and e.index == index]
        assert "".join(event.text for event in events) == choice.text
    assert answer.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)


def test_a_seed_gives_the_same_text_whatever_else_runs(engine: NativeEngine) -> None:
    request = ask("Seeded", random_seed=3, **SAMPLED)
    alone = finished(engine.submit(request).result())
    others = [engine.submit(ask("x" * n, **SAMPLED)) for n in range(1, 20)]
    crowded = engine.submit(request)
    others += [engine.submit(ask("y" * n, **SAMPLED)) for n in range(1, 10)]
    assert finished(crowded.result()).token_ids == alone.token_ids
    for other in others:
        finished(other.result())


def test_logprobs_are_those_of_the_raw_logits(
    engine: NativeEngine, plain_logits: Callable[[EngineRequest, list[int]], np.ndarray]
) -> None:
    request = ask(logprobs=3, max_new_tokens=6, ignore_eos=True, repetition_penalty=2.0)
    *deltas, answer = list(engine.submit(request))
    answer = finished(answer)  # type: ignore[arg-type]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [next(iter(each)) for each in logprobs] == answer.token_ids
    streamed = [each for e in deltas if isinstance(e, TokenEvent) for each in e.logprobs or ()]
    assert streamed == logprobs
    raw = torch.from_numpy(plain_logits(request, answer.token_ids)).log_softmax(-1)
    for offset, each in enumerate(logprobs):
        row = raw[answer.prompt_tokens - 1 + offset]
        for token, value in each.items():
            assert value == pytest.approx(float(row[token]), abs=1e-4)
        likeliest = set(row.topk(3).indices.tolist())
        assert likeliest <= set(each)
    tokens = answer.choices[0].tokens
    assert tokens is not None
    assert set(tokens) == {token for each in logprobs for token in each}
    joined = b"".join(bytes_of(tokens[token]) for token in answer.token_ids)
    assert joined.decode(errors="replace") == answer.text


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("which", ["generation", "all"])
def test_logits_are_those_of_the_model(
    text_model: Path,
    plain_logits: Callable[[EngineRequest, list[int]], np.ndarray],
    which: str,
    chunked: bool,
) -> None:
    config = EngineConfig(engine="native", model=str(text_model), device="cpu", block_size=4)
    if chunked:
        config = EngineConfig(
            engine="native", model=str(text_model), device="cpu", block_size=4, max_step_tokens=5
        )
    engine = open_engine(config)
    try:
        request = ask("Hello there", output_logits=which, max_new_tokens=5, ignore_eos=True)
        for _ in range(2):  # the second time, the prompt is in the cache
            answer = finished(engine.submit(request).result())
            logits = answer.choices[0].logits
            assert logits is not None
            expected = plain_logits(request, answer.token_ids)[:-1]
            # The row before the first generated token belongs to both stretches.
            first = answer.prompt_tokens - 1
            if which == "all":
                expected = np.concatenate([expected[: first + 1], expected[first:]])
            else:
                expected = expected[first:]
            np.testing.assert_allclose(logits, expected, atol=1e-4)
    finally:
        engine.close()


def test_perplexity_is_the_mean_loss_of_the_prompt(
    engine: NativeEngine,
    plain_logits: Callable[[EngineRequest, list[int]], np.ndarray],
    text_model: Path,
) -> None:
    request = ask("How surprising is this?", return_ppl=True, max_new_tokens=1)
    answer = finished(engine.submit(request).result())
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How surprising is this?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    logits = torch.from_numpy(plain_logits(request, []))
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert answer.ppl == pytest.approx(float(loss), abs=1e-4)


def test_json_comes_out_as_json(engine: NativeEngine) -> None:
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "blue"]},
            "count": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema}}
    requests = [
        ask(response_format=response_format, random_seed=seed, **{**SAMPLED, "max_new_tokens": 120})
        for seed in range(6)
    ]
    handles = [engine.submit(request) for request in requests]
    plain = engine.submit(ask())
    for handle in handles:
        answer = finished(handle.result())
        value = json.loads(answer.text)
        assert value["colour"] in ("red", "blue")
        assert 0 <= value["count"] <= 99
        assert answer.finish_reason == "stop"
    finished(plain.result())


def test_a_regular_expression_is_followed(engine: NativeEngine) -> None:
    response_format = {"type": "regex_schema", "regex_schema": "(yes|no), [0-9]{3}"}
    answer = finished(engine.submit(ask(response_format=response_format)).result())
    assert answer.text[:-5] in ("yes", "no")
    assert answer.text[-3:].isdigit()


def test_a_schema_that_cannot_be_compiled_fails_its_own_request(engine: NativeEngine) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    error = failed(engine.submit(ask(response_format=bad)).result()).error
    assert isinstance(error, InvalidRequest)
    assert error.param == "gen_config.response_format"


def test_an_answer_that_goes_round_in_circles_is_stopped(engine: NativeEngine) -> None:
    all_but_three = [token for token in range(261) if token not in (100, 101, 102)]
    fields = {"max_new_tokens": 60, "ignore_eos": True, "bad_token_ids": all_but_three}
    free = finished(engine.submit(ask(**fields)).result())
    stopped = finished(
        engine.submit(ask(**fields, repetition_ngram_size=2, repetition_ngram_threshold=3)).result()
    )
    assert free.completion_tokens == 60
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: stopped.completion_tokens]
    last = tuple(stopped.token_ids[-2:])
    pairs = list(zip(stopped.token_ids, stopped.token_ids[1:], strict=False))
    assert pairs.count(last) == 3


def test_a_logits_processor_sees_the_tokens_and_changes_the_logits(engine: NativeEngine) -> None:
    seen: list[list[int]] = []

    def force(token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(token_ids.tolist())
        logits[:] = -1.0
        logits[70 + len(seen) - 1] = 1.0
        return logits

    request = replace(ask(max_new_tokens=4), logits_processors=(force,))
    answer = finished(engine.submit(request).result())
    assert answer.token_ids == [70, 71, 72, 73]
    assert len(seen[0]) == answer.prompt_tokens
    assert [ids[answer.prompt_tokens :] for ids in seen] == [[], [70], [70, 71], [70, 71, 72]]


def test_a_logits_processor_that_raises_fails_its_own_request(engine: NativeEngine) -> None:
    def broken(token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    bad = engine.submit(replace(ask(), logits_processors=(broken,)))
    good = engine.submit(ask())
    failed(bad.result())
    finished(good.result())


def test_a_prompt_as_long_as_the_context_allows_is_answered(
    engine: NativeEngine, picture: Callable[[int], PixelBuffer]
) -> None:
    probe = finished(engine.submit(ask("a", max_new_tokens=1)).result())
    room = engine.info.max_context - probe.prompt_tokens
    answer = finished(engine.submit(ask("a" * room, max_new_tokens=1)).result())
    assert answer.prompt_tokens == engine.info.max_context - 1
