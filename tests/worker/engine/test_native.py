"""The native engine answers as transformers' `generate` does, token for token, however it batches.

For every family, one ragged batch: prompts of mixed lengths, none to four pictures of different
sizes, answers of different lengths; under schedules that force chunks, preemption, cancellation,
prefix hits and steps launched ahead.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.worker.engine.asking import ask, failed, finished
from tests.worker.engine.families.models import FAMILIES, takes_images
from tests.worker.engine.native_engines import (
    BATCH,
    assert_nothing_is_held,
    batch,
    engine_for,
    expected,
    known,
    longest,
    pixels,
)
from visq.errors import ImageNotFound
from visq.pixels import PixelBuffer
from visq.types import Message
from worker.engine import prefiller
from worker.engine.face import Failed, Handle

SCHEDULES: dict[str, dict[str, Any]] = {
    "all at once": {},
    "small chunks": {"max_step_tokens": 7, "block_size": 4, "max_encode_tokens": 5},
    "few slots": {"max_batch_size": 2, "block_size": 16},
    "launched ahead": {"overlap": True, "block_size": 8, "max_step_tokens": 48},
    "no caches": {"prefix_caching": False, "vision_cache_bytes": 1, "max_step_tokens": 30},
    "decodes apart": {"split_decodes": True, "block_size": 8, "overlap": True},
    "preemption, decodes apart": {
        "tight": True,
        "split_decodes": True,
        "block_size": 4,
        "overlap": True,
        "max_step_tokens": 64,
    },
    "preemption": {"tight": True, "block_size": 4, "max_step_tokens": 64},
    "preemption, launched ahead": {"tight": True, "block_size": 4, "overlap": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


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


def test_prompts_padded_to_the_sizes_of_graphs_are_answered_alike(
    folder: Path, pictures: list[PixelBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA graphs of short prompts compute, at once: padding and all."""
    monkeypatch.setattr(prefiller, "CONTEXT", 2048)
    engine = engine_for(folder, block_size=8, max_step_tokens=64, split_decodes=True)
    runner = engine._runner
    padded = prefiller.Prefiller(
        engine._family, runner._cache, runner._kernels, axes=runner._axes, graphs=False
    )
    padded.warm_up(64)  # so that every step fits
    runner.prefiller = padded
    calls: list[int] = []
    run = padded.run
    monkeypatch.setattr(padded, "run", lambda *args: calls.append(1) or run(*args))
    try:
        for _ in range(2):
            handles = [engine.submit(request) for request in batch(folder, pictures)]
            answers = [finished(handle.result()).token_ids for handle in handles]
            assert answers == expected(folder, pictures)
        assert calls
        assert_nothing_is_held(engine)
    finally:
        engine.close()


def test_two_engines_in_one_process_answer_side_by_side(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    engines = [engine_for(internvl, block_size=8, max_step_tokens=16) for _ in range(2)]
    try:
        for _ in range(3):
            handles = [
                [engine.submit(request) for request in batch(internvl, pictures)]
                for engine in engines
            ]
            for of_one in handles:
                answers = [finished(handle.result()).token_ids for handle in of_one]
                assert answers == expected(internvl, pictures)
    finally:
        for engine in engines:
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
