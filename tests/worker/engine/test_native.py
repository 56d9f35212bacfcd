"""The native engine answers as transformers' `generate` does, token for token, however it batches.

For every family, one ragged batch: prompts of mixed lengths, none to four pictures of different
sizes, answers of different lengths; under schedules that force chunks, preemption, cancellation,
prefix hits and steps launched ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoConfig

from tests.worker.engine.asking import ask, failed, finished
from tests.worker.engine.families.models import FAMILIES, load, reference, takes_images
from visq.errors import ImageNotFound, VisqError
from visq.pixels import PixelBuffer
from worker.engine.attention.cache import bytes_per_block
from worker.engine.config import EngineConfig
from worker.engine.face import EngineRequest, Failed, Handle, KnownImage
from worker.engine.native import NativeEngine
from worker.engine.opening import open_engine

SIZES = ((40, 50), (64, 30), (90, 100), (33, 33), (20, 70))
"""Height and width of the pictures."""

BATCH: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("Hello", (), 5),
    ("What is this?", (0,), 24),
    ("Compare.", (1, 2), 17),
    ("x " * 25, (), 24),
    ("What is that?", (3,), 9),
    ("All of them!", (0, 1, 2, 4), 24),
    ("What is this?", (1,), 24),
    ("What is this?", (0,), 12),
)
"""Text, pictures (indices of `SIZES`), length of the answer."""

SCHEDULES: dict[str, dict[str, Any]] = {
    "all at once": {},
    "small chunks": {"max_step_tokens": 7, "block_size": 4, "max_encode_tokens": 5},
    "few slots": {"max_batch_size": 2, "block_size": 16},
    "launched ahead": {"overlap": True, "block_size": 8, "max_step_tokens": 48},
    "no caches": {"prefix_caching": False, "vision_cache_bytes": 1, "max_step_tokens": 30},
    "preemption": {"tight": True, "block_size": 4, "max_step_tokens": 64},
    "preemption, launched ahead": {"tight": True, "block_size": 4, "overlap": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["internvl"](tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def pictures() -> Iterator[list[PixelBuffer]]:
    buffers = [PixelBuffer.create(pixels(seed), f"{seed:064x}") for seed in range(len(SIZES))]
    yield buffers
    for buffer in buffers:
        buffer.release()


def pixels(seed: int) -> NDArray[np.uint8]:
    height, width = SIZES[seed]
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3))
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)


def batch(folder: Path, pictures: list[PixelBuffer], **fields: Any) -> list[EngineRequest]:
    shown = takes_images(folder)
    return [
        ask(text, *(pictures[i] for i in indices if shown), max_new_tokens=length, **fields)
        for text, indices, length in BATCH
    ]


_EXPECTED: dict[Path, list[list[int]]] = {}


def expected(folder: Path, pictures: list[PixelBuffer]) -> list[list[int]]:
    if folder not in _EXPECTED:
        _EXPECTED[folder] = [
            reference(folder, each.messages, each.images, each.gen_config.max_new_tokens or 0)
            for each in batch(folder, pictures)
        ]
    return _EXPECTED[folder]


_LONGEST: dict[Path, int] = {}


def longest(folder: Path, pictures: list[PixelBuffer]) -> int:
    """Most tokens of a prompt and its answer."""
    if folder not in _LONGEST:
        engine = engine_for(folder)
        answers = [engine.submit(request).result() for request in batch(folder, pictures)]
        engine.close()
        _LONGEST[folder] = max(
            finished(answer).prompt_tokens + length
            for answer, (_, _, length) in zip(answers, BATCH, strict=True)
        )
    return _LONGEST[folder]


def engine_for(folder: Path, *, blocks: int | None = None, **fields: Any) -> NativeEngine:
    config = EngineConfig(model=str(folder), device="cpu", engine="native", **fields)
    if blocks is not None:
        text = AutoConfig.from_pretrained(folder).get_text_config()
        nbytes = bytes_per_block(
            layers=text.num_hidden_layers,
            block_size=config.block_size,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            dtype=load(folder)[0].dtype,
        )
        config = replace(config, kv_cache_bytes=blocks * nbytes)
    engine = open_engine(config)
    assert isinstance(engine, NativeEngine)
    return engine


def assert_nothing_is_held(engine: NativeEngine) -> None:
    stats = engine.stats()
    assert (stats.queued, stats.waiting, stats.running, stats.held_blocks) == (0, 0, 0, 0)
    assert stats.available_blocks == stats.total_blocks


def test_the_reference_varies_and_sees_its_pictures(
    folder: Path, pictures: list[PixelBuffer]
) -> None:
    answers = expected(folder, pictures)
    assert all(len(set(answer)) > 2 for answer in answers if len(answer) > 5)
    if takes_images(folder):
        assert answers[1] != answers[6], "the same question on another picture"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_ragged_batch_is_answered_as_generate_answers(
    folder: Path, pictures: list[PixelBuffer], schedule: str
) -> None:
    fields = dict(SCHEDULES[schedule])
    if fields.pop("tight", False):  # just enough for the longest one
        fields["blocks"] = 2 + longest(folder, pictures) // fields["block_size"]
    engine = engine_for(folder, **fields)
    try:
        for _ in range(2):  # the second time with all that the caches keep
            handles = [engine.submit(request) for request in batch(folder, pictures)]
            answers = [finished(handle.result()).token_ids for handle in handles]
            assert answers == expected(folder, pictures)
        stats = engine.stats()
        if "preemption" in schedule:
            assert stats.preemptions > 0
        if schedule == "all at once":
            assert stats.prefix_hits > 0
        assert_nothing_is_held(engine)
    finally:
        engine.close()


def test_cancelling_some_changes_nothing_for_the_others(
    folder: Path, pictures: list[PixelBuffer]
) -> None:
    blocks = 4 + longest(folder, pictures) // 16
    engine = engine_for(folder, blocks=blocks, block_size=16, max_step_tokens=40, overlap=True)
    try:
        handles: list[Handle] = []
        for request in batch(folder, pictures):
            handles.append(engine.submit(request))
            unwanted = engine.submit(
                replace(
                    request, gen_config=request.gen_config.model_copy(update={"ignore_eos": True})
                )
            )
            unwanted.cancel()
        answers = [finished(handle.result()).token_ids for handle in handles]
        assert answers == expected(folder, pictures)
        assert_nothing_is_held(engine)
    finally:
        engine.close()


def test_the_same_text_with_another_picture_shares_no_block_of_it(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    engine = engine_for(internvl, block_size=4)
    try:
        first = finished(engine.submit(ask("What is this?", pictures[0])).result())
        twin = PixelBuffer.create(255 - pixels(0), "f" * 64)
        try:
            other = finished(engine.submit(ask("What is this?", twin)).result())
        finally:
            twin.release()
        again = finished(engine.submit(ask("What is this?", pictures[0])).result())
        assert other.prompt_tokens == first.prompt_tokens
        assert other.token_ids != first.token_ids
        before_the_picture = len("<|im_start|>user\n<img>") - 16  # one token a byte or special one
        assert other.cached_tokens <= before_the_picture
        assert again.token_ids == first.token_ids
        assert again.cached_tokens > first.prompt_tokens - 8
    finally:
        engine.close()


def test_tenants_share_neither_blocks_nor_pictures(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    engine = engine_for(internvl, block_size=4)
    try:
        request = ask("What is this?", pictures[0])
        answers = [
            finished(engine.submit(replace(request, cache_salt=salt)).result())
            for salt in ("one", "two", "one")
        ]
        assert [answer.cached_tokens > 0 for answer in answers] == [False, False, True]
        assert len({tuple(answer.token_ids) for answer in answers}) == 1
        assert engine.stats().encoded_images == 2
    finally:
        engine.close()


def test_a_prefix_hit_over_a_picture_needs_no_encoding(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    engine = engine_for(internvl, block_size=4, vision_cache_bytes=1)
    try:
        finished(engine.submit(ask("What is this?", pictures[0])).result())
        encoded = engine.stats().encoded_images
        finished(engine.submit(ask("What else?", pictures[0])).result())
        assert engine.stats().encoded_images == encoded == 1
    finally:
        engine.close()


def test_a_broken_picture_fails_its_own_request_only(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    engine = engine_for(internvl)
    try:
        broken = PixelBuffer(pictures[0].name, 10**6, 10**6, "a" * 64)
        bad = engine.submit(ask("What?", broken))
        good = engine.submit(ask("What is this?", pictures[0]))
        assert isinstance(bad.result(), Failed)
        finished(good.result())
        assert_nothing_is_held(engine)
    finally:
        engine.close()


def test_the_exact_tokens_of_a_former_answer_make_the_next_turn_a_prefix_hit(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    from visq.types import Message

    engine = engine_for(internvl, block_size=4)
    try:
        first = ask("What is this?", pictures[0], max_new_tokens=12, ignore_eos=True)
        answer = finished(engine.submit(first).result())
        turn = replace(
            first,
            messages=[
                *first.messages,
                Message(role="assistant", content=answer.text or "-"),
                Message(role="user", content="And now?"),
            ],
            answer_ids={1: answer.token_ids},
        )
        second = finished(engine.submit(turn).result())
        known = answer.prompt_tokens + answer.completion_tokens
        # The last token of the answer was never computed, and a last block may be unfinished.
        assert second.cached_tokens >= known - 1 - 4
    finally:
        engine.close()


def known(picture: PixelBuffer, loads: list[str], error: VisqError | None = None) -> KnownImage:
    """`picture` as one that was shown before; `loads` notes when its pixels are asked for."""

    def load() -> PixelBuffer:
        loads.append(picture.sha256)
        if error is not None:
            raise error
        return picture

    return KnownImage(picture.sha256, picture.height, picture.width, load)


@pytest.mark.parametrize("cache", ["prefix", "vision"])
def test_a_known_picture_that_is_cached_is_not_loaded(
    internvl: Path, pictures: list[PixelBuffer], cache: str
) -> None:
    fields: dict[str, Any] = {"vision_cache_bytes": 1} if cache == "prefix" else {}
    engine = engine_for(internvl, block_size=4, prefix_caching=cache == "prefix", **fields)
    loads: list[str] = []
    try:
        request = ask("What is this?", pictures[0])
        first = finished(engine.submit(request).result())
        again = replace(request, images=[known(pictures[0], loads)])
        assert finished(engine.submit(again).result()).token_ids == first.token_ids
        assert loads == []
    finally:
        engine.close()


def test_a_known_picture_that_is_not_cached_is_loaded_once(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    loads: list[str] = []
    for _ in range(2):
        engine = engine_for(internvl, block_size=4, max_step_tokens=6)
        try:
            request = ask("What is this?", pictures[1])
            unseen = replace(request, images=[known(pictures[1], loads)])
            answer = finished(engine.submit(unseen).result())
            assert answer.token_ids == expected(internvl, pictures)[6]
            assert_nothing_is_held(engine)
        finally:
            engine.close()
    assert len(loads) == 2


def test_a_known_picture_that_cannot_be_loaded_fails_its_own_request(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    engine = engine_for(internvl)
    try:
        gone = ImageNotFound("it is gone")
        bad = engine.submit(
            replace(ask("What?", pictures[2]), images=[known(pictures[2], [], gone)])
        )
        good = engine.submit(ask("What is this?", pictures[0]))
        assert failed(bad.result()).error is gone
        finished(good.result())
        assert_nothing_is_held(engine)
    finally:
        engine.close()


@dataclass
class Faulty:
    """A decoder that fails as a real one may: by what is in a step, or by its size."""

    decoder: Any
    poison: float | None = None
    """A position that it cannot bear."""
    memory: int = 10**9
    """Tokens that it has memory for."""

    def __call__(self, *, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        if self.poison is not None and (kwargs["position_ids"] == self.poison).any():
            raise RuntimeError("poison")
        if inputs_embeds.shape[1] > self.memory:
            raise torch.OutOfMemoryError("no memory")
        return self.decoder(inputs_embeds=inputs_embeds, **kwargs)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_the_model_cannot_bear_is_found_and_fails_alone(
    internvl: Path, pictures: list[PixelBuffer], overlap: bool
) -> None:
    engine = engine_for(internvl, overlap=overlap, max_step_tokens=4096)
    poisonous = longest(internvl, pictures) + 10
    engine._family.decoder = Faulty(engine._family.decoder, poison=poisonous)
    try:
        handles = [engine.submit(request) for request in batch(internvl, pictures)]
        poison = engine.submit(ask("x" * (poisonous + 1)))
        answers = [finished(handle.result()).token_ids for handle in handles]
        assert answers == expected(internvl, pictures)
        failed(poison.result())
        assert_nothing_is_held(engine)
    finally:
        engine.close()


def test_steps_shrink_until_the_memory_is_enough(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    engine = engine_for(internvl, block_size=8, max_step_tokens=4096)
    engine._family.decoder = Faulty(engine._family.decoder, memory=20)
    try:
        handles = [engine.submit(request) for request in batch(internvl, pictures)]
        answers = [finished(handle.result()).token_ids for handle in handles]
        assert answers == expected(internvl, pictures)
        assert_nothing_is_held(engine)
    finally:
        engine.close()


def test_a_request_that_no_memory_is_enough_for_fails_retryably(internvl: Path) -> None:
    engine = engine_for(internvl)
    engine._family.decoder = Faulty(engine._family.decoder, memory=0)
    try:
        assert failed(engine.submit(ask()).result()).error.retryable
        assert engine.alive
    finally:
        engine.close()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    block_size=st.integers(1, 24),
    max_step_tokens=st.integers(1, 80),
    max_encode_tokens=st.integers(1, 40),
    max_batch_size=st.integers(1, 9),
    spare=st.integers(0, 30),
    overlap=st.booleans(),
    order=st.permutations(range(len(BATCH))),
    unwanted=st.sets(st.integers(0, len(BATCH) - 1), max_size=3),
)
def test_any_schedule_gives_the_same_answers(
    internvl: Path,
    pictures: list[PixelBuffer],
    block_size: int,
    max_step_tokens: int,
    max_encode_tokens: int,
    max_batch_size: int,
    spare: int,
    overlap: bool,
    order: list[int],
    unwanted: set[int],
) -> None:
    room = longest(internvl, pictures) + spare * 8
    engine = engine_for(
        internvl,
        blocks=2 + room // block_size,
        block_size=block_size,
        max_step_tokens=max_step_tokens,
        max_encode_tokens=max_encode_tokens,
        max_batch_size=max_batch_size,
        overlap=overlap,
    )
    try:
        requests = batch(internvl, pictures)
        handles = {index: engine.submit(requests[index]) for index in order}
        for index in unwanted:
            handles[index].cancel()
        for index in set(handles) - unwanted:
            assert (
                finished(handles[index].result()).token_ids == expected(internvl, pictures)[index]
            )
        for index in unwanted:
            handles[index].result()
        assert_nothing_is_held(engine)
    finally:
        engine.close()
