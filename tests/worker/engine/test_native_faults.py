"""Whatever fails, or does not come, is the affair of its own request; and closing always works."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.waiting import until
from tests.worker.engine.asking import ask, failed, finished
from tests.worker.engine.models import IMAGE
from tests.worker.engine.native_engines import (
    assert_nothing_is_held,
    batch,
    engine_for,
    expected,
    known,
    longest,
    outcome_of,
    together,
)
from visq.errors import ContextLengthExceeded, EngineError, InvalidRequest
from visq.pixels import PixelBuffer
from visq.types import Lane
from worker.engine import intake, scheduler
from worker.engine.face import EngineRequest, KnownImage, Stopped
from worker.engine.families.base import ImageFeatures, PreparedImage
from worker.engine.generation import Generation
from worker.engine.native import NativeEngine
from worker.engine.sampler import SampleRow

Picture = Callable[[int], PixelBuffer]
UNWANTED = 200
"""A bad token that only some requests name: the tests know them by it."""


@dataclass
class Faulty:
    """A decoder that fails as a real one may: by what is in a step, or by its size."""

    decoder: Any
    poison: float | None = None
    """A position that it cannot bear."""
    memory: int = 10**9
    """Tokens that it has memory for."""
    memory_before: int = 10**9
    """Positions that it has memory for."""

    def __call__(self, *, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        if self.poison is not None and (kwargs["position_ids"] == self.poison).any():
            raise RuntimeError("poison")
        full = inputs_embeds.shape[1] > self.memory
        if full or (kwargs["position_ids"] >= self.memory_before).any():
            raise torch.OutOfMemoryError("no memory")
        return self.decoder(inputs_embeds=inputs_embeds, **kwargs)


@dataclass
class Blocked:
    """A picture that was shown before, whose loading takes until `come` is set."""

    picture: PixelBuffer
    come: threading.Event = field(default_factory=threading.Event)
    loads: list[str] = field(default_factory=list)

    def known(self, sha256: str = "") -> KnownImage:
        """:param sha256: a name of its own, so that it is loaded though another one is, too."""
        buffer = self.picture

        def load() -> PixelBuffer:
            self.loads.append(sha256)
            assert self.come.wait(60)
            return buffer

        return KnownImage(sha256 or buffer.sha256, buffer.height, buffer.width, load)


@contextmanager
def opened(folder: Path, **fields: Any) -> Iterator[NativeEngine]:
    engine = engine_for(folder, **fields)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def blocked(picture: Picture) -> Iterator[Blocked]:
    blocked = Blocked(picture(1))
    yield blocked
    blocked.come.set()


def marked(generation: Generation) -> bool:
    return UNWANTED in generation.params.banned_ids


def raise_in_row(
    monkeypatch: pytest.MonkeyPatch, when: Callable[[Generation], bool]
) -> list[Generation]:
    """Let the choices of which `when` says so fail to say how their next token is sampled.

    A grammar may do that, where its automaton becomes too large. No small grammar does so
    reliably, so it is done by hand. Returns the other generations that were asked.
    """
    asked: list[Generation] = []
    original = Generation.row
    # As with a grammar: plain ones are not asked.
    monkeypatch.setattr(Generation, "__post_init__", lambda self: setattr(self, "plain", False))

    def row(self: Generation) -> SampleRow:
        if when(self):
            raise InvalidRequest("the grammar is too complex")
        asked.append(self)
        return original(self)

    monkeypatch.setattr(Generation, "row", row)
    return asked


# --- one request in a step ---------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_the_model_cannot_bear_is_found_and_fails_alone(
    internvl: Path, pictures: list[PixelBuffer], overlap: bool
) -> None:
    with opened(internvl, overlap=overlap, max_step_tokens=4096) as engine:
        poisonous = longest(internvl, pictures) + 10
        engine._family.decoder = Faulty(engine._family.decoder, poison=poisonous)
        handles = [engine.submit(request) for request in batch(internvl, pictures)]
        poison = engine.submit(ask("x" * (poisonous + 1)))
        answers = [finished(outcome_of(handle)).token_ids for handle in handles]
        assert answers == expected(internvl, pictures)
        failed(outcome_of(poison))
        assert_nothing_is_held(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_choice_that_fails_before_a_step_leaves_the_others_their_own_tokens(
    text_model: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    sampled = {"do_sample": True, "temperature": 1.5, "top_k": 0, "ignore_eos": True}
    victim = ask("victim", random_seed=5, max_new_tokens=20, **sampled)
    attacker = ask(
        "attacker", n=2, random_seed=1, bad_token_ids=[UNWANTED], max_new_tokens=150, **sampled
    )
    with opened(text_model, overlap=overlap) as engine:
        alone = finished(outcome_of(engine.submit(victim))).token_ids

        def second_choice_beside_the_victim(generation: Generation) -> bool:
            choice = generation.sequence.order[2]
            return choice == 1 and sum(not marked(each) for each in asked) > 5

        asked = raise_in_row(monkeypatch, second_choice_beside_the_victim)
        bad, good = together(engine, attacker, victim)
        assert isinstance(failed(outcome_of(bad)).error, InvalidRequest)
        assert finished(outcome_of(good)).token_ids == alone
        assert_nothing_is_held(engine)


def test_a_picture_of_a_request_that_has_just_failed_is_not_encoded(
    vision_model: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_in_row(monkeypatch, marked)
    with opened(vision_model) as engine:
        bad, good = together(
            engine,
            ask("What?", picture(1), bad_token_ids=[UNWANTED]),
            ask("hi", max_new_tokens=3),
        )
        failed(outcome_of(bad))
        finished(outcome_of(good))
        assert engine.stats().encoded_images == 0
        assert_nothing_is_held(engine)


def test_a_request_for_whose_sampling_there_is_no_memory_fails_alone(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(text_model) as engine:
        begin = engine._sampler.begin

        def full(slot: int, params: Any, generated: Any = ()) -> None:
            if params.repetition_penalty != 1.0:
                raise torch.OutOfMemoryError("no memory")
            begin(slot, params, generated)

        monkeypatch.setattr(engine._sampler, "begin", full)
        bad, good = together(engine, ask(repetition_penalty=1.5), ask())
        failed(outcome_of(bad))
        finished(outcome_of(good))
        assert_nothing_is_held(engine)


def test_what_the_encoder_says_of_a_picture_is_what_its_request_fails_with(
    vision_model: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(vision_model) as engine:
        error = EngineError("the checkpoint's processor does not fit it")

        def misfit(images: Any) -> Any:
            raise error

        monkeypatch.setattr(engine._family, "image_features", misfit)
        assert failed(outcome_of(engine.submit(ask("What?", picture(1))))).error is error
        assert engine.alive


# --- memory --------------------------------------------------------------------------------------


def test_steps_shrink_until_the_memory_is_enough(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    with opened(internvl, block_size=8, max_step_tokens=4096) as engine:
        engine._family.decoder = Faulty(engine._family.decoder, memory=20)
        handles = [engine.submit(request) for request in batch(internvl, pictures)]
        answers = [finished(outcome_of(handle)).token_ids for handle in handles]
        assert answers == expected(internvl, pictures)
        assert_nothing_is_held(engine)


def test_a_request_that_no_memory_is_enough_for_fails_retryably(internvl: Path) -> None:
    with opened(internvl) as engine:
        engine._family.decoder = Faulty(engine._family.decoder, memory=0)
        assert failed(outcome_of(engine.submit(ask()))).error.retryable
        assert engine.alive


def test_requests_for_which_there_is_memory_only_one_by_one_are_answered(text_model: Path) -> None:
    with opened(text_model) as engine:
        requests = [ask("abcd", max_new_tokens=5), ask("efgh", max_new_tokens=5)]
        answers = [finished(outcome_of(engine.submit(each))) for each in requests]
        prompt = answers[0].prompt_tokens
        assert prompt * 2 <= engine._sizes.limits.block_size, "a step cannot be made smaller"
        engine._vision.clear()
        engine._family.decoder = Faulty(engine._family.decoder, memory=prompt)
        handles = together(engine, *requests)
        assert [finished(outcome_of(each)).token_ids for each in handles] == [
            answer.token_ids for answer in answers
        ]
        assert_nothing_is_held(engine)


def test_a_request_that_ran_out_of_memory_leaves_the_steps_of_the_others_as_large(
    text_model: Path,
) -> None:
    with opened(text_model, block_size=8, prefix_caching=False) as engine:
        engine._family.decoder = Faulty(engine._family.decoder, memory_before=200)
        assert failed(outcome_of(engine.submit(ask("x" * 180)))).error.retryable
        assert steps_of(engine, ask("y" * 150, max_new_tokens=1)) == 1


def test_steps_grow_again_when_there_is_memory_again(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "GROW_AFTER", 4)
    with opened(text_model, block_size=8, prefix_caching=False) as engine:
        engine._family.decoder = faulty = Faulty(engine._family.decoder, memory=20)
        long = ask("y" * 150, max_new_tokens=1)
        assert steps_of(engine, long) > 5
        faulty.memory = 10**9
        # From 16 tokens to 512, 5 times 4 good steps.
        finished(outcome_of(engine.submit(ask(max_new_tokens=30, ignore_eos=True))))
        assert steps_of(engine, long) == 1


def steps_of(engine: NativeEngine, request: EngineRequest) -> int:
    before = engine.stats().steps
    finished(outcome_of(engine.submit(request)))
    return engine.stats().steps - before


def test_a_refusal_that_the_caller_keeps_holds_no_pixels(
    vision_model: Path, picture: Picture
) -> None:
    with opened(vision_model, prepared_bytes=1) as engine:
        refused = outcome_of(engine.submit(ask("What?", picture(1), max_new_tokens=10**5)))
        assert isinstance(failed(refused).error, ContextLengthExceeded)
        finished(outcome_of(engine.submit(ask("What?", picture(2), max_new_tokens=1))))


def test_a_request_with_more_pictures_than_fit_is_refused_before_all_are_prepared(
    vision_model: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(vision_model) as engine:
        prepared = keep_prepared(engine, monkeypatch)
        many = [picture(seed) for seed in range(80)]
        refused = failed(outcome_of(engine.submit(ask("x", *many)))).error
        assert isinstance(refused, ContextLengthExceeded)
        assert 0 < len(prepared) < 40


# --- who waits, and who does not -----------------------------------------------------------------


def keep_prepared(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> list[PreparedImage]:
    """Return a list that gets, and so keeps in memory, every picture that is prepared."""
    kept: list[PreparedImage] = []
    prepare = engine._family.prepare_image

    def keep(pixels: NDArray[np.uint8]) -> PreparedImage:
        kept.append(prepare(pixels))
        return kept[-1]

    monkeypatch.setattr(engine._family, "prepare_image", keep)
    return kept


def test_only_requests_with_pictures_wait_for_memory_for_pixels_and_they_can_be_ended(
    vision_model: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(vision_model, prepared_bytes=1) as engine:
        kept = keep_prepared(engine, monkeypatch)
        finished(outcome_of(engine.submit(ask("What?", picture(1), max_new_tokens=1))))
        assert len(kept) == 1, "the memory is taken"
        late = engine.submit(ask("What?", picture(2), lane=Lane.BATCH, deadline=0.05))
        unwanted = engine.submit(ask("What?", picture(3), lane=Lane.BATCH))
        patient = engine.submit(ask("What?", picture(4), lane=Lane.BATCH, max_new_tokens=1))
        finished(outcome_of(engine.submit(ask(max_new_tokens=1))))
        assert outcome_of(late) == Stopped("expired")
        unwanted.cancel()
        assert outcome_of(unwanted) == Stopped("cancelled")
        assert not patient.ended
        kept.clear()
        finished(outcome_of(patient))


def test_requests_that_wait_for_pixels_leave_their_slots_to_others(
    vision_model: Path, blocked: Blocked
) -> None:
    with opened(vision_model, max_batch_size=4) as engine:
        waiting = [
            engine.submit(
                replace(
                    ask(f"{number}", blocked.picture, max_new_tokens=1),
                    images=[blocked.known()],
                    cache_salt=f"tenant {number}",
                )
            )
            for number in range(4)
        ]
        until(lambda: len(blocked.loads) == 4, 10, "all of them to wait for their pixels")
        finished(outcome_of(engine.submit(ask(max_new_tokens=1))))
        stats = engine.stats()
        assert (stats.waiting, stats.running, stats.held_blocks) == (4, 0, 0)
        blocked.come.set()
        for handle in waiting:
            finished(outcome_of(handle))
        assert_nothing_is_held(engine)


def test_a_suspect_that_waits_for_pixels_holds_up_nobody(
    vision_model: Path, blocked: Blocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(vision_model) as engine:
        encode, calls = engine._family.image_features, iter(range(100))

        def fails_twice(images: Any) -> list[ImageFeatures]:
            # In the step of all, and in that of the first one alone.
            if next(calls) < 2:
                raise RuntimeError("poison")
            return encode(images)

        monkeypatch.setattr(engine._family, "image_features", fails_twice)
        # The prompt begins with the picture, so that without it there is nothing to compute.
        shown = ask(f"{IMAGE}What?", blocked.picture, do_preprocess=False, max_new_tokens=3)
        guilty, waiting, bystander = together(
            engine,
            shown,
            replace(shown, images=[blocked.known()]),
            ask("hi", max_new_tokens=30, ignore_eos=True),
        )
        failed(outcome_of(guilty))
        finished(outcome_of(bystander))
        assert not waiting.ended
        finished(outcome_of(engine.submit(ask("a newcomer", max_new_tokens=2))))
        blocked.come.set()
        finished(outcome_of(waiting))


def test_a_prompt_that_begins_with_a_known_picture_is_answered_in_a_fresh_slot(
    vision_model: Path, picture: Picture
) -> None:
    shown = ask(f"{IMAGE}What?", picture(1), do_preprocess=False, max_new_tokens=8)
    with opened(vision_model) as engine:
        answer = finished(outcome_of(engine.submit(shown))).token_ids
    with opened(vision_model) as engine:
        loads: list[str] = []
        again = replace(shown, images=[known(picture(1), loads)])
        assert finished(outcome_of(engine.submit(again))).token_ids == answer
        assert len(loads) == 1


# --- the threads beside the model ----------------------------------------------------------------


def test_a_panic_of_a_library_fails_one_request_and_the_next_one_is_prepared(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """As libraries in Rust raise it: it is no Exception."""

    with opened(text_model) as engine:
        grammars = engine._intake._grammars
        compile_grammar = grammars.compile

        def panic(response_format: Any) -> Any:
            if response_format:
                raise PanicException("index out of bounds")
            return compile_grammar(response_format)

        monkeypatch.setattr(grammars, "compile", panic)
        bad = engine.submit(ask(response_format={"type": "json_object"}))
        assert isinstance(failed(outcome_of(bad)).error, EngineError)
        finished(outcome_of(engine.submit(ask(max_new_tokens=1))))


def test_a_picture_is_not_loaded_for_requests_that_have_ended_meanwhile(
    vision_model: Path, blocked: Blocked
) -> None:
    count = intake.LOADERS + 6
    with opened(vision_model) as engine:
        handles = [
            engine.submit(
                replace(ask("What?", blocked.picture), images=[blocked.known(f"{number:064x}")])
            )
            for number in range(count)
        ]
        until(lambda: engine.stats().waiting == count, 10, "all of them to wait for their pixels")
        until(lambda: len(blocked.loads) == intake.LOADERS, 10, "the first ones to be loaded")
        for handle in handles:
            handle.cancel()
        assert {outcome_of(handle) for handle in handles} == {Stopped("cancelled")}
        blocked.come.set()
        engine._intake._again.shutdown(wait=True)  # all that was asked for is done then
        assert len(blocked.loads) == intake.LOADERS


def test_closing_does_not_wait_for_a_picture_that_is_being_loaded(
    vision_model: Path, blocked: Blocked
) -> None:
    engine = engine_for(vision_model)
    handle = engine.submit(replace(ask("What?", blocked.picture), images=[blocked.known()]))
    until(lambda: blocked.loads, 10, "the loading")
    closing = threading.Thread(target=engine.close)
    closing.start()
    try:
        until(lambda: not closing.is_alive(), 10, "the closing")
        assert failed(outcome_of(handle)).error.retryable
    finally:
        blocked.come.set()
        closing.join()
