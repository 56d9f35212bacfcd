"""Both engines on tiny models: their answers, their limits, their failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from tests.worker.engine.asking import ask, failed, finished
from tests.worker.engine.models import CONTEXT, save_text_model
from visq.errors import (
    AdapterNotFound,
    ConfigurationError,
    ContextLengthExceeded,
    EngineCrashed,
    EngineError,
    InvalidRequest,
    UnsupportedParameter,
)
from visq.pixels import PixelBuffer
from visq.types import Lane
from worker.engine.config import EngineConfig
from worker.engine.face import Event, Finished, Handle, Stopped, TokenEvent
from worker.engine.opening import LocalEngine, open_engine

QUESTIONS = ("Hello", "What is this?", "Zwölf 🙂", "x " * 20)


def endless(**gen_config: Any) -> dict[str, Any]:
    """Fields for an answer that goes on until the context is full."""
    return {"max_new_tokens": None, "ignore_eos": True, **gen_config}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_greedy_answer_is_that_of_generate(
    vision_engine: LocalEngine,
    vision_model: Path,
    question: str,
    images: int,
    picture: Callable[[int], PixelBuffer],
) -> None:
    pictures = [picture(seed) for seed in range(images)]
    expected = reference(vision_model, question, pictures)
    answer = finished(vision_engine.submit(ask(question, *pictures)).result())
    assert answer.token_ids == expected
    decode = AutoProcessor.from_pretrained(vision_model).tokenizer.decode
    assert answer.text == decode(expected, skip_special_tokens=True)


def reference(folder: Path, question: str, images: list[PixelBuffer]) -> list[int]:
    """The answer's tokens, without the end token, as anybody would write it."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    pictures = {"images": [Image.fromarray(image.array()) for image in images]} if images else {}
    inputs = processor(text=[text], return_tensors="pt", **pictures)
    end = processor.tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return [token for token in tokens if token != end]


def test_another_picture_gives_another_answer(
    vision_engine: LocalEngine, picture: Callable[[int], PixelBuffer]
) -> None:
    answers = {
        finished(vision_engine.submit(ask("What?", picture(seed))).result()).text
        for seed in range(3)
    }
    assert len(answers) == 3


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_events_make_the_answer(text_engine: LocalEngine, question: str) -> None:
    *deltas, answer = list(text_engine.submit(ask(question, skip_special_tokens=False)))
    assert isinstance(answer, Finished)
    tokens = [event for event in deltas if isinstance(event, TokenEvent)]
    assert len(tokens) == len(deltas) > 1
    assert "".join(event.text for event in tokens) == answer.text
    assert [token for event in tokens for token in event.token_ids] == answer.token_ids
    assert answer.completion_tokens == len(answer.token_ids)


def test_max_new_tokens_ends_an_answer_by_length(text_engine: LocalEngine) -> None:
    answer = finished(text_engine.submit(ask(max_new_tokens=5, ignore_eos=True)).result())
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 5)


def test_without_max_new_tokens_the_answer_may_fill_the_context(
    text_engine: LocalEngine,
) -> None:
    answer = finished(text_engine.submit(ask(**endless())).result())
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + answer.completion_tokens == CONTEXT


@pytest.mark.parametrize(
    ("text", "max_new_tokens", "numbers"),
    [("a" * 100, 200, ("121", "200", "256", "135")), ("a" * 500, None, ("521", "256"))],
)
def test_what_does_not_fit_the_context_is_refused_with_the_numbers(
    text_engine: LocalEngine, text: str, max_new_tokens: int | None, numbers: tuple[str, ...]
) -> None:
    error = failed(text_engine.submit(ask(text, max_new_tokens=max_new_tokens)).result()).error
    assert isinstance(error, ContextLengthExceeded)
    assert all(number in error.message for number in numbers), error.message


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_word_over_several_tokens_ends_the_answer(
    text_engine: LocalEngine, include: bool
) -> None:
    whole = finished(text_engine.submit(ask()).result())
    word = whole.text[4:7]  # every token is one byte
    start = whole.text.index(word)
    handle = text_engine.submit(ask(stop_words=[word], include_stop_str_in_output=include))
    *deltas, answer = list(handle)
    assert isinstance(answer, Finished)
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: start + (len(word) if include else 0)]
    assert "".join(event.text for event in deltas if isinstance(event, TokenEvent)) == answer.text
    assert answer.completion_tokens < whole.completion_tokens


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_ends_the_answer(text_engine: LocalEngine, include: bool) -> None:
    whole = finished(text_engine.submit(ask()).result()).token_ids
    at = next(i for i in range(3, len(whole)) if whole[i] not in whole[:i])
    request = ask(stop_token_ids=[whole[at]], include_stop_str_in_output=include)
    answer = finished(text_engine.submit(request).result())
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole[: at + 1 if include else at]


def test_stop_tokens_and_words_wait_for_min_new_tokens(text_engine: LocalEngine) -> None:
    whole = finished(text_engine.submit(ask()).result())
    early = finished(
        text_engine.submit(ask(stop_words=[whole.text[0]], min_new_tokens=10)).result()
    )
    assert early.completion_tokens >= 10
    masked = finished(
        text_engine.submit(ask(stop_token_ids=whole.token_ids[:1], min_new_tokens=10)).result()
    )
    assert masked.completion_tokens >= 10
    assert whole.token_ids[0] not in masked.token_ids[:10]


def test_bad_tokens_and_bad_words_never_come(text_engine: LocalEngine) -> None:
    whole = finished(text_engine.submit(ask()).result())
    tokens = finished(text_engine.submit(ask(bad_token_ids=whole.token_ids[:5])).result())
    assert not set(whole.token_ids[:5]) & set(tokens.token_ids)
    word = next(
        whole.text[i : i + 2] for i in range(30) if whole.text[i : i + 2].isascii()
    )  # two tokens
    words = finished(text_engine.submit(ask(bad_words=[word])).result())
    assert word not in words.text


def test_the_repetition_penalty_counts_generated_tokens_even_when_greedy(
    text_engine: LocalEngine,
) -> None:
    request = ask(**endless(max_new_tokens=100))
    plain = finished(text_engine.submit(request).result()).token_ids
    request = ask(**endless(max_new_tokens=100, repetition_penalty=3.0))
    varied = finished(text_engine.submit(request).result()).token_ids
    assert len(set(varied)) > len(set(plain))


def test_a_seed_gives_the_same_text_whatever_ran_before(text_engine: LocalEngine) -> None:
    def sample(seed: int | None) -> str:
        request = ask(do_sample=True, temperature=1.5, random_seed=seed, ignore_eos=True)
        return finished(text_engine.submit(request).result()).text

    first = sample(7)
    others = {sample(seed) for seed in (8, 2**63 - 1, None, None)}
    assert sample(7) == first
    assert len(others | {first}) == 5


def test_sampling_leaves_the_random_state_of_the_process_alone(
    text_engine: LocalEngine,
) -> None:
    before = torch.random.get_rng_state()
    finished(text_engine.submit(ask(do_sample=True, random_seed=1)).result())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}])
def test_sampling_of_the_likeliest_only_is_greedy(
    text_engine: LocalEngine, fields: dict[str, Any]
) -> None:
    greedy = finished(text_engine.submit(ask()).result())
    sampled = finished(text_engine.submit(ask(do_sample=True, **fields)).result())
    assert sampled.token_ids == greedy.token_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", 3),
        ("logprobs", 0),
        ("response_format", {"type": "json_object"}),
        ("output_logits", "all"),
        ("return_ppl", True),
        ("repetition_ngram_size", 3),
        ("repetition_ngram_threshold", 2),
    ],
)
def test_a_field_that_generate_cannot_honour_is_refused_by_name(
    plain_engine: LocalEngine, field: str, value: object
) -> None:
    error = failed(plain_engine.submit(ask(**{field: value})).result()).error
    assert isinstance(error, UnsupportedParameter)
    assert error.param == f"gen_config.{field}"


def test_an_adapter_is_not_found(text_engine: LocalEngine) -> None:
    error = failed(text_engine.submit(ask(adapter="cats")).result()).error
    assert isinstance(error, AdapterNotFound)
    assert "cats" in error.message


@pytest.mark.parametrize("field", ["stop_token_ids", "bad_token_ids"])
def test_a_token_that_the_model_does_not_have_is_refused(
    text_engine: LocalEngine, field: str
) -> None:
    error = failed(text_engine.submit(ask(**{field: [1_000_000]})).result()).error
    assert isinstance(error, InvalidRequest)
    assert error.param == f"gen_config.{field}"


def test_a_failure_inside_one_request_is_its_own(
    vision_engine: LocalEngine, picture: Callable[[int], PixelBuffer]
) -> None:
    lost = picture(1)
    broken = PixelBuffer(lost.name, height=10**6, width=10**6, sha256=lost.sha256)
    error = failed(vision_engine.submit(ask("What?", broken)).result()).error
    assert type(error) is EngineError
    assert "visq-" not in error.message, "details are for the log"
    finished(vision_engine.submit(ask()).result())


def test_a_running_request_ends_soon_after_its_cancel(text_engine: LocalEngine) -> None:
    handle = text_engine.submit(ask(**endless()))
    events = iter(handle)
    assert isinstance(next(events), TokenEvent)
    handle.cancel()
    rest = list(events)
    assert rest[-1] == Stopped("cancelled")
    assert len(rest) < CONTEXT / 2
    handle.cancel()  # once more does no harm


def test_a_deadline_ends_a_running_request(text_engine: LocalEngine) -> None:
    busy = text_engine.submit(ask(**endless(), deadline=0.05))
    assert busy.result() == Stopped("expired")


def test_waiting_requests_end_at_once_by_cancel_and_in_time_by_deadline(
    text_engine: LocalEngine,
) -> None:
    seen = Seen()
    seen.submit(text_engine, "running", **endless())
    seen.submit(text_engine, "late", deadline=0.0)
    unwanted = seen.submit(text_engine, "unwanted")
    unwanted.cancel()
    seen.wait()
    assert seen.outcomes["unwanted"] == Stopped("cancelled")
    assert seen.outcomes["late"] == Stopped("expired")
    assert seen.order[-1] == "running", "neither had to wait for the running one"


def test_a_better_lane_goes_first(one_at_a_time: LocalEngine) -> None:
    seen = Seen()
    seen.submit(one_at_a_time, "running", **endless())
    seen.submit(one_at_a_time, "batch", lane=Lane.BATCH)
    seen.submit(one_at_a_time, "standard", lane=Lane.STANDARD)
    seen.submit(one_at_a_time, "first chat", lane=Lane.INTERACTIVE)
    seen.submit(one_at_a_time, "second chat", lane=Lane.INTERACTIVE)
    seen.wait()
    assert seen.order == ["running", "first chat", "second chat", "standard", "batch"]


def test_closing_fails_what_is_open_so_that_it_is_tried_again(text_model: Path) -> None:
    engine = open_engine(EngineConfig(engine="generate", model=str(text_model), device="cpu"))
    handles = [engine.submit(ask(**endless())) for _ in range(3)]
    engine.close()
    handles.append(engine.submit(ask()))
    assert not engine.alive
    for handle in handles:
        assert isinstance(failed(handle.result()).error, EngineCrashed)


def test_info_says_what_was_loaded(text_engine: LocalEngine, text_model: Path, kind: str) -> None:
    info = text_engine.info
    assert (info.model, info.engine, info.device) == (str(text_model), kind, "cpu")
    assert (info.dtype, info.max_context) == ("float32", CONTEXT)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no model"):
        open_engine(EngineConfig(model=str(tmp_path / "nothing")))


def test_a_broken_checkpoint_is_a_configuration_error(tmp_path: Path) -> None:
    save_text_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigurationError, match=r"cannot be loaded"):
        open_engine(EngineConfig(model=str(tmp_path)))


class Seen:
    """Remembers in which order requests end, and how."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.outcomes: dict[str, Event] = {}
        self._ended: list[threading.Event] = []

    def submit(self, engine: LocalEngine, name: str, **fields: Any) -> Handle:
        ended = threading.Event()
        self._ended.append(ended)

        def note(event: Event) -> None:
            if not isinstance(event, TokenEvent):
                self.order.append(name)
                self.outcomes[name] = event
                ended.set()

        return engine.submit(ask(**fields), note)

    def wait(self) -> None:
        for ended in self._ended:
            assert ended.wait(60), "a request did not end"
