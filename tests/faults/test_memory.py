"""The memory of the device is at its end, at any place of a step: the engine lives, and everybody
gets the answer that they would have got.

There is no device here: what would allocate raises, as torch does, at the calls that a test names.
(`tests/worker/engine/test_cuda_memory.py` exhausts a real one.)
"""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.engine.asking import ask, failed, finished
from tests.worker.engine.families.models import FAMILIES
from tests.worker.engine.native_engines import (
    SIZES,
    assert_nothing_is_held,
    batch,
    engine_for,
    expected,
    outcome_of,
    pixels,
)
from visq.pixels import PixelBuffer
from worker.engine.face import EngineRequest, Failed, Finished
from worker.engine.families.base import PreparedImage
from worker.engine.native import NativeEngine

PLACES = {
    "vision": ("_family", "image_features"),
    "embeddings": ("_family", "embed_tokens"),
    "layers": ("_family", "decoder"),
    "logits": ("_family", "lm_head"),
    "sampling": ("_sampler", "sample"),
    "plain sampling": ("_sampler", "sample_plain"),
    "log probabilities": ("_sampler", "_pack_logprobs"),
    "slots": ("_sampler", "begin"),
}
"""Where a step allocates: an engine's part, and what of it is called."""


class Fails:
    """Calls `real`, but for the calls of which `when` says so."""

    def __init__(self, real: Callable[..., Any], when: Callable[..., bool]) -> None:
        self._real = real
        self._when = when
        self.failures = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._when(*args, **kwargs):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self._real(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def break_at(engine: NativeEngine, place: str, when: Callable[..., bool]) -> Fails:
    owner, name = PLACES[place]
    part = getattr(engine, owner)
    real = getattr(part, name)
    if isinstance(real, torch.nn.Module):
        part.__dict__.pop(name, None)
    fails = Fails(real, when)
    setattr(part, name, fails)
    return fails


class At:
    """The calls of these numbers, from 0."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def __call__(self) -> Callable[..., bool]:
        calls = iter(range(10**9))
        return lambda *_, **__: next(calls) in self._numbers

    def __repr__(self) -> str:
        return f"calls {self._numbers}"


def large_steps() -> Callable[..., bool]:
    """Calls of the layers with more than 20 tokens."""
    return lambda *, inputs_embeds, **_: inputs_embeds.shape[1] > 20


@contextmanager
def opened(folder: Path, **fields: Any) -> Iterator[NativeEngine]:
    engine = engine_for(folder, **fields)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["internvl"](tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # answers are compared token for token


@pytest.fixture(scope="module")
def pictures() -> Iterator[list[PixelBuffer]]:
    buffers = [PixelBuffer.create(pixels(seed), f"{seed:064x}") for seed in range(len(SIZES))]
    yield buffers
    for buffer in buffers:
        buffer.release()


def prepared_left() -> int:
    """Prepared pixels that somebody still holds."""
    gc.collect()
    return sum(
        type(each) is PreparedImage and "pixel_values" in each.tensors for each in gc.get_objects()
    )


@pytest.mark.parametrize(
    ("place", "when", "overlap"),
    [
        ("vision", At(0), True),
        ("vision", At(0, 1, 2), False),
        ("embeddings", At(0), True),
        ("layers", At(0), False),
        ("layers", At(0, 1, 2, 5), True),
        ("layers", large_steps, False),
        ("layers", large_steps, True),
        ("logits", At(0), False),
        ("logits", At(5, 6, 9), True),
        ("plain sampling", At(4), True),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_an_end_of_memory_in_a_step_changes_nobodys_answer(
    folder: Path,
    pictures: list[PixelBuffer],
    place: str,
    when: Callable[[], Callable[..., bool]],
    overlap: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "worker.engine")  # a kept traceback keeps all in it
    before = prepared_left()
    with opened(folder, overlap=overlap, block_size=8, max_step_tokens=512) as engine:
        fails = break_at(engine, place, when())
        handles = [engine.submit(request) for request in batch(folder, pictures)]
        answers = [finished(outcome_of(handle)).token_ids for handle in handles]
        assert fails.failures
        assert answers == expected(folder, pictures)
        assert_nothing_is_held(engine)
        assert prepared_left() == before


@pytest.mark.parametrize(("place", "when"), [("slots", At(0, 3)), ("log probabilities", At(0, 4))])
def test_sampling_that_finds_no_memory_half_way_is_done_again_as_if_for_the_first_time(
    folder: Path, pictures: list[PixelBuffer], place: str, when: At
) -> None:
    with opened(folder) as engine:
        alone = [finished(outcome_of(engine.submit(each))) for each in varied(pictures)]
        fails = break_at(engine, place, when())
        handles = [engine.submit(each) for each in varied(pictures)]
        answers = [finished(outcome_of(handle)) for handle in handles]
        assert fails.failures == 2
        assert [each.token_ids for each in answers] == [each.token_ids for each in alone]
        assert_nothing_is_held(engine)


def varied(pictures: list[PixelBuffer]) -> list[EngineRequest]:
    """Requests whose sampling has a state: a second time on it must not change the answer."""
    fields: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True}
    return [
        ask("Hello", repetition_penalty=1.4, logprobs=2, **fields),
        ask("What is this?", pictures[0], repetition_penalty=1.4, logprobs=1, **fields),
        ask("a " * 20, do_sample=True, temperature=1.2, top_k=0, random_seed=3, **fields),
        ask("Who?", pictures[1], do_sample=True, random_seed=4, logprobs=3, **fields),
        ask("Plain.", pictures[2], **fields),
        ask("Long.", repetition_penalty=1.2, n=2, do_sample=True, random_seed=9, **fields),
    ]


@pytest.mark.parametrize(("seed", "overlap"), [(1, False), (2, True), (3, True)])
def test_whatever_allocation_fails_by_chance_the_answers_are_the_same(
    folder: Path,
    pictures: list[PixelBuffer],
    seed: int,
    overlap: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A request that could not even be computed alone fails retryably, and is asked again."""
    caplog.set_level(logging.CRITICAL, "worker.engine")  # a kept traceback keeps all in it
    before = prepared_left()
    chance = random.Random(seed)
    with opened(folder, overlap=overlap, block_size=8) as engine:
        alone = [finished(outcome_of(engine.submit(each))).choices for each in varied(pictures)]
        broken = [
            break_at(engine, place, lambda *_, **__: chance.random() < 0.04) for place in PLACES
        ]
        for _ in range(3):
            left = dict(enumerate(varied(pictures)))
            while left:
                handles = {number: engine.submit(each) for number, each in left.items()}
                for number, handle in handles.items():
                    outcome = outcome_of(handle)
                    if isinstance(outcome, Failed):
                        assert outcome.error.retryable, outcome
                        continue
                    assert isinstance(outcome, Finished)
                    del left[number]
                    for ours, theirs in zip(outcome.choices, alone[number], strict=True):
                        assert ours.token_ids == theirs.token_ids
                        assert ours.text == theirs.text
        assert sum(each.failures for each in broken) > 10
        assert engine.alive
        assert_nothing_is_held(engine)
        assert prepared_left() == before


def test_a_request_that_no_memory_is_enough_for_fails_retryably_and_the_others_are_answered(
    folder: Path, pictures: list[PixelBuffer]
) -> None:
    with opened(folder, block_size=8, prefix_caching=False) as engine:
        break_at(engine, "layers", lambda *, position_ids, **_: bool((position_ids >= 200).any()))
        handles = [engine.submit(request) for request in batch(folder, pictures)]
        huge = engine.submit(ask("x" * 210, max_new_tokens=4))
        answers = [finished(outcome_of(handle)).token_ids for handle in handles]
        assert answers == expected(folder, pictures)
        error = failed(outcome_of(huge)).error
        assert (error.code, error.retryable) == ("engine_crashed", True)
        assert engine.alive
        assert_nothing_is_held(engine)
