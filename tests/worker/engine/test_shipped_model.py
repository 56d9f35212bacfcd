"""The model that ships, in the engine and in the plainest use of transformers: the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.worker.engine.asking import ask, finished, image_part
from visq.pixels import PixelBuffer
from visq.types import GenerationConfig, ImagePart, Message, TextPart
from worker.engine.config import SMALL_MODEL, EngineConfig
from worker.engine.face import EngineRequest
from worker.engine.opening import LocalEngine, open_engine

MOST_TOKENS = 12
SAMPLES = SMALL_MODEL / "samples"
ENTRIES = json.loads((SAMPLES / "samples.json").read_text())

Plain = Callable[[list[Message], list[PixelBuffer]], list[int]]


@pytest.fixture(scope="module")
def engine(kind: Literal["native", "generate"]) -> Iterator[LocalEngine]:
    engine = open_engine(EngineConfig(engine=kind, device="cpu"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(SMALL_MODEL)


@pytest.fixture(scope="module")
def plain(processor: Any) -> Plain:
    """Messages and pictures to tokens, as anybody would write it."""
    model = AutoModelForImageTextToText.from_pretrained(SMALL_MODEL, dtype=torch.float32).eval()

    def answer(messages: list[Message], images: list[PixelBuffer]) -> list[int]:
        conversation = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"}
                    if isinstance(part, ImagePart)
                    else {"type": "text", "text": part.text}
                    for part in message.parts()
                ],
            }
            for message in messages
        ]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = processor(
            text=[text],
            images=[Image.fromarray(image.array()) for image in images] or None,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
        return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]

    return answer


def user(images: int, text: str) -> Message:
    content = [*(image_part() for _ in range(images)), TextPart(text=text)]
    return Message(role="user", content=content)


CONVERSATIONS = {
    "text": (0, [user(0, "Hello")]),
    "a picture": (1, [user(1, "What do you see?")]),
    "two pictures": (2, [user(2, "What is different?")]),
    "several turns": (
        2,
        [
            user(1, "How many circles are there?"),
            Message(role="assistant", content="3"),
            user(1, "And here?"),
            Message(role="assistant", content="There are two."),
            user(0, "Which has more?"),
        ],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_greedy_answer_is_that_of_generate(
    name: str,
    engine: LocalEngine,
    processor: Any,
    plain: Plain,
    picture: Callable[[int], PixelBuffer],
) -> None:
    number, messages = CONVERSATIONS[name]
    images = [picture(seed) for seed in range(number)]
    request = EngineRequest(
        name, messages, images, gen_config=GenerationConfig(max_new_tokens=MOST_TOKENS)
    )
    answer = finished(engine.submit(request).result())
    expected = plain(messages, images)
    if answer.finish_reason == "stop":
        assert expected.pop() == processor.tokenizer.eos_token_id
    assert answer.token_ids == expected
    assert answer.text == processor.tokenizer.decode(expected, skip_special_tokens=True)


def test_every_sample_is_answered_right(engine: LocalEngine) -> None:
    wrong = []
    for entry in ENTRIES:
        with Image.open(SAMPLES / entry["file"]) as image:
            shown = PixelBuffer.create(np.asarray(image.convert("RGB")), entry["file"])
        messages: list[Message] = []
        for number, turn in enumerate([entry, entry.get("follow_up")]):
            if turn is None:
                continue
            messages.append(user(1 - number, turn["question"]))
            request = EngineRequest(
                entry["file"], list(messages), [shown], gen_config=GenerationConfig()
            )
            answer = finished(engine.submit(request).result())
            messages.append(Message(role="assistant", content=answer.text))
            if (answer.text, answer.finish_reason) != (turn["answer"], "stop"):
                wrong.append((entry["file"], turn["question"], answer.text))
        shown.release()
    assert wrong == []


def test_the_samples_show_every_kind_of_picture() -> None:
    assert {entry["file"] for entry in ENTRIES} == {file.name for file in SAMPLES.glob("*.png")}
    kinds = {entry["file"].partition("-")[2].removesuffix(".png") for entry in ENTRIES}
    assert kinds == {"shapes", "large", "word", "number", "icons", "bars", "noise"}


def test_it_takes_one_thread_so_that_a_busy_machine_does_not_make_it_wait(
    engine: LocalEngine,
) -> None:
    finished(engine.submit(ask(max_new_tokens=1)).result())
    assert torch.get_num_threads() == 1
