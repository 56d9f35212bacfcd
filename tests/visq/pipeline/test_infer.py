"""`Pipeline.infer`: one prompt or many, in order, each prompt's fault its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from tests.visq.pipeline.conftest import SAMPLES, TRUTH
from visq.errors import ConfigurationError, InvalidRequest, Unavailable
from visq.pipeline import (
    ChatTemplateConfig,
    EngineConfig,
    GenerationConfig,
    Pipeline,
    Response,
    pipeline,
)
from visq.pixels import PixelBuffer
from visq.vl import load_image
from worker.engine.config import SMALL_MODEL
from worker.engine.face import EngineInfo, EngineRequest, Event, Handle, TokenEvent

FILES = ["01-shapes.png", "15-word.png", "19-icons.png", "22-bars.png"]


class Watched:
    """A running engine, and how many requests it had at most."""

    def __init__(self, engine: Any, capacity: int = 2) -> None:
        self._engine = engine
        self._capacity = capacity
        self._lock = threading.Lock()
        self.open = 0
        self.most = 0
        self.requests: list[EngineRequest] = []

    @property
    def info(self) -> EngineInfo:
        return replace(self._engine.info, capacity=self._capacity)

    def submit(self, request: EngineRequest, sink: Callable[[Event], None] | None = None) -> Handle:
        assert sink is not None
        with self._lock:
            self.requests.append(request)
            self.open += 1
            self.most = max(self.most, self.open)

        def seen(event: Event) -> None:
            if not isinstance(event, TokenEvent):
                with self._lock:
                    self.open -= 1
            sink(event)

        handle: Handle = self._engine.submit(request, seen)
        return handle

    def close(self) -> None:
        """It stays open for the others."""


@pytest.fixture
def watched(pipe: Pipeline) -> Watched:
    return Watched(pipe.engine)


def test_one_prompt_gives_one_response(pipe: Pipeline, sample: Path) -> None:
    response = pipe(("How many things are there?", load_image(sample)))
    assert isinstance(response, Response)
    assert response.text == "9"
    assert response.finish_reason == "stop"
    assert response.generate_token_len == len(response.token_ids) == 1
    assert response.index == 0
    assert str(response).startswith("text=9\ninput_token_len=")


def test_every_form_of_the_same_prompt_has_the_same_answer(pipe: Pipeline, sample: Path) -> None:
    question, image = "How many things are there?", load_image(sample)
    part = {"type": "text", "text": question}
    forms: list[Any] = [
        (question, image),
        (question, [image]),
        (question, sample),
        (question, sample.as_uri()),
        [{"role": "user", "content": [part, {"type": "image_url", "image_url": str(sample)}]}],
        [{"role": "user", "content": [part, {"type": "image_data", "image_data": image}]}],
    ]
    responses = pipe.infer(forms)
    assert {response.text for response in responses} == {"9"}
    assert len({tuple(response.token_ids) for response in responses}) == 1


def test_many_prompts_are_answered_in_order(
    pipe: Pipeline, nothing_left: Callable[[], None]
) -> None:
    prompts = [(TRUTH[file]["question"], SAMPLES / file) for file in FILES] * 3
    responses = pipe(prompts, use_tqdm=True)
    assert [each.text for each in responses] == [TRUTH[file]["answer"] for file in FILES] * 3
    assert [each.index for each in responses] == list(range(len(prompts)))


def test_an_empty_list_has_no_answers(pipe: Pipeline) -> None:
    assert pipe([]) == []


def test_each_prompt_may_have_a_config_of_its_own(pipe: Pipeline) -> None:
    configs = [GenerationConfig(max_new_tokens=tokens) for tokens in (1, 3)]
    short, long = pipe(["Hello!", "Hello!"], gen_config=configs)
    assert (short.generate_token_len, short.finish_reason) == (1, "length")
    assert long.generate_token_len == 3
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        pipe(["Hello!"], gen_config=configs)


def test_a_bad_prompt_fails_alone(
    pipe: Pipeline, sample: Path, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    (tmp_path / "broken.png").write_bytes(sample.read_bytes()[:-200])
    bad = [
        ("what?", tmp_path / "missing.png"),
        ("what?", tmp_path / "broken.png"),
        ("what?", [sample, tmp_path / "missing.png"]),
        [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
        "word " * 5000,
    ]
    good = ("How many things are there?", sample)
    responses = pipe([good, *bad, good])
    assert [response.text for response in responses] == ["9", "", "", "", "", "", "9"]
    assert [response.error_code for response in responses] == [
        None,
        "image_not_found",
        "image_undecodable",
        "image_not_found",
        "unsupported_parameter",
        "context_length_exceeded",
        None,
    ]
    assert all(response.finish_reason == "error" for response in responses[1:6])
    assert "broken.png is a damaged" in str(responses[2].error_message)


def test_what_the_engine_refuses_is_named(pipe: Pipeline) -> None:
    response = pipe("Hello!", adapter_name="nobody")
    assert (response.finish_reason, response.error_code) == ("error", "adapter_not_found")
    assert "nobody" in response.error_message


def test_a_call_that_does_not_fit_raises_before_anything_is_sent(
    pipe: Pipeline, watched: Watched
) -> None:
    with pytest.raises(ValueError, match="unsupported prompt"):
        Pipeline.over(watched)(["Hello!", 7])
    assert watched.requests == []


def test_a_raw_prompt_has_no_template(pipe: Pipeline) -> None:
    raw = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    assert pipe(raw, do_preprocess=False).input_token_len < pipe(raw).input_token_len


def test_the_system_message_and_stop_words_of_a_template_config_count(watched: Watched) -> None:
    template = ChatTemplateConfig("any", meta_instruction="Be brief.", stop_words=["know"])
    pipe = Pipeline.over(watched, template)
    response = pipe("Hello!", gen_config=GenerationConfig(stop_words=["never"]))
    [request] = watched.requests
    assert (request.messages[0].role, request.messages[0].content) == ("system", "Be brief.")
    assert request.gen_config.stop_words == ["never", "know"]
    assert "know" not in response.text
    pipe("Hello!", do_preprocess=False)
    assert [message.role for message in watched.requests[1].messages] == ["user"]


def test_a_long_list_is_never_in_the_engine_all_at_once(
    watched: Watched, sample: Path, nothing_left: Callable[[], None]
) -> None:
    responses = Pipeline.over(watched)([("How many things are there?", sample)] * 12)
    assert len(responses) == 12
    assert 1 < watched.most <= watched.info.capacity + 1


def test_when_shared_memory_is_full_prompts_wait_for_those_before_them(
    pipe: Pipeline,
    sample: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_left: Callable[[], None],
) -> None:
    alive: set[str] = set()
    refused = 0
    create, release = PixelBuffer.create, PixelBuffer.release
    lock = threading.Lock()

    def create_if_none(array: Any, sha256: str) -> PixelBuffer:
        nonlocal refused
        with lock:
            if alive:
                refused += 1
                raise Unavailable("shared memory is full")
            buffer = create(array, sha256)
            alive.add(buffer.name)
            return buffer

    def counted(buffer: PixelBuffer) -> None:
        release(buffer)
        alive.discard(buffer.name)

    monkeypatch.setattr(PixelBuffer, "create", create_if_none)
    monkeypatch.setattr(PixelBuffer, "release", counted)
    responses = pipe([("How many things are there?", sample)] * 4)
    assert [response.text for response in responses] == ["9"] * 4
    assert refused > 0
    two = pipe(("what?", [sample, sample]))  # there will never be room for both
    assert two.error_code == "unavailable"


def test_an_interrupted_call_leaves_nothing_behind(
    watched: Watched, sample: Path, nothing_left: Callable[[], None]
) -> None:
    class StopError(Exception):
        pass

    class Thrower(Pipeline):
        def _answers(self, asked: Any) -> Iterator[Any]:  # type: ignore[override]
            for number, response in enumerate(super()._answers(asked)):
                if number == 1:
                    raise StopError
                yield response

    with pytest.raises(StopError):
        Thrower.over(watched)([("How many things are there?", sample)] * 8)
    nothing_left()
    assert len(watched.requests) < 8


def test_a_closed_pipeline_answers_nothing() -> None:
    with pipeline("small", backend_config=EngineConfig(device="cpu")) as pipe:
        assert pipe("Hello!").finish_reason == "stop"
    pipe.close()
    assert pipe("Hello!").error_code == "unavailable"


def test_a_picture_of_any_mode_is_shown_as_a_person_sees_it(pipe: Pipeline, sample: Path) -> None:
    image = Image.open(sample).convert("RGB")
    turned = image.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned.info["exif"] = exif.tobytes()
    question = "How many things are there?"
    for other in (image.convert("RGBA"), image.convert("P"), turned):
        assert pipe((question, other)).text == "9"


def test_prompts_are_scored_by_their_tokens(pipe: Pipeline) -> None:
    prompt = [7, 30, 41, 8, 100, 2]
    one, two = pipe.get_ppl([prompt, prompt[:3]])
    assert pipe.get_ppl(prompt) == [pytest.approx(one)]
    assert one != pytest.approx(two)
    with pytest.raises(InvalidRequest, match="10000000"):
        pipe.get_ppl([1, 10_000_000])


def test_a_prompt_is_scored_beside_its_answer(pipe: Pipeline) -> None:
    ids = AutoTokenizer.from_pretrained(SMALL_MODEL)("How many things are there?")["input_ids"]
    config = GenerationConfig(return_ppl=True, output_logits="all")
    response = pipe("How many things are there?", config, do_preprocess=False)
    assert response.input_token_len == len(ids)
    likelihoods = response.logits.log_softmax(-1)
    losses = [-float(likelihoods[place, token]) for place, token in enumerate(ids[1:])]
    assert response.ppl == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_tokens_to_score_are_checked(pipe: Pipeline) -> None:
    wrong: Any
    for wrong in ([1], [[1, 2], [3]], "text", [[1, "a"]], 7):
        with pytest.raises(ValueError, match="at least two"):
            pipe.get_ppl(wrong)
    assert pipe.get_ppl([]) == []


def test_all_choices_come_back(pipe: Pipeline) -> None:
    config = GenerationConfig(n=3, do_sample=True, temperature=2.0, random_seed=1, max_new_tokens=8)
    response = pipe("Red or green?", gen_config=config)
    assert [choice.choice for choice in response.choices] == [0, 1, 2]
    assert response.text == response.choices[0].text
    assert len({choice.text for choice in response.choices}) > 1
    pieces = list(pipe.stream_infer("Red or green?", gen_config=config))
    for choice in response.choices:
        mine = [piece for piece in pieces if piece.choice == choice.choice]
        assert "".join(piece.text for piece in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason


def test_logits_and_logprobs_come_with_the_answer(pipe: Pipeline) -> None:
    response = pipe("Hello!", gen_config=GenerationConfig(output_logits="generation", logprobs=2))
    assert response.logits.shape[0] == response.generate_token_len
    assert response.logits.argmax(-1).tolist() == response.token_ids
    assert [next(iter(each)) for each in response.logprobs] == response.token_ids


def test_a_logits_processor_changes_the_answer(pipe: Pipeline) -> None:
    def only_seven(token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        changed = torch.full_like(logits, -torch.inf)
        changed[7] = 0
        return changed

    config = GenerationConfig(logits_processors=[only_seven], max_new_tokens=3)
    assert pipe("Hello!", gen_config=config).token_ids == [7, 7, 7]


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="backend_config"):
        pipeline("small", backend_config=object())  # type: ignore[arg-type]
