"""What requests cost, and that what is said about it is true."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.waiting import until
from tests.worker.engine.asking import ask, finished
from tests.worker.engine.native_engines import engine_for, outcome_of, together
from visq.pixels import PixelBuffer
from visq.types import Lane
from worker.engine.face import EngineRequest, Event, KnownImage, TokenEvent
from worker.engine.native import NativeEngine

Picture = Callable[[int], PixelBuffer]

DRIVER = ask("urgent", max_new_tokens=1)
"""Of the best lane: drives out a request of a worse one where no slot is free."""


def drive_out(engine: NativeEngine, *drivers: EngineRequest) -> None:
    """In the engine's thread: the next round of its loop meets `drivers`."""
    for driver in drivers:
        engine.submit(driver)
    until(lambda: engine._inbox.qsize() == len(drivers), 10, "the requests to be prepared")


@dataclass
class DrivesOut:
    """A decoder that, in the second chunk of a prompt, lets a better request come."""

    engine: NativeEngine
    decoder: Any
    chunks: int = 0

    def __call__(self, **kwargs: Any) -> Any:
        if kwargs["inputs_embeds"].shape[1] > 3:
            self.chunks += 1
            if self.chunks == 2:
                drive_out(self.engine, DRIVER)
        return self.decoder(**kwargs)


def test_a_preempted_request_gets_each_row_of_its_logits_once(text_model: Path) -> None:
    engine = engine_for(text_model, block_size=4, max_step_tokens=13, max_batch_size=2)
    try:
        request = ask(
            "q" * 60,
            lane=Lane.BATCH,
            max_new_tokens=20,
            ignore_eos=True,
            output_logits="all",
            return_ppl=True,
        )
        alone = finished(outcome_of(engine.submit(request)))
        # One gets the free slot, one drives out. The first still runs when the prompt comes once
        # more: then in chunks of 12 tokens, not of 13.
        drivers = (replace(DRIVER, gen_config=ask(max_new_tokens=40).gen_config), DRIVER)
        tokens: list[Event] = []

        def sink(event: Event) -> None:
            tokens.append(event)
            if len(tokens) == 1:
                drive_out(engine, *drivers)

        handle = engine.submit(request, sink)
        until(lambda: handle.ended, 20, "the answer")
        until(lambda: not isinstance(tokens[-1], TokenEvent), 10, "the outcome")
        outcome = tokens[-1]
        assert not isinstance(outcome, TokenEvent)
        answer = finished(outcome)
        assert engine.stats().preemptions > 0
        want, got = alone.choices[0].logits, answer.choices[0].logits
        assert want is not None
        assert got is not None
        assert len(want) == alone.prompt_tokens + 20
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert answer.ppl == pytest.approx(alone.ppl, abs=1e-4)
    finally:
        engine.close()


def test_tokens_that_a_preemption_computes_again_are_not_called_cached(text_model: Path) -> None:
    engine = engine_for(text_model, block_size=4, max_step_tokens=10, max_batch_size=1)
    try:
        engine._family.decoder = DrivesOut(engine, engine._family.decoder)
        request = ask("q" * 150, lane=Lane.BATCH, max_new_tokens=1)
        answer = finished(outcome_of(engine.submit(request)))
        stats = engine.stats()
        assert stats.preemptions == 1
        assert answer.cached_tokens == 0, "nobody has ever shown this prompt"
        driver = finished(outcome_of(engine.submit(DRIVER)))
        assert stats.prefix_queries == answer.prompt_tokens + driver.prompt_tokens
    finally:
        engine.close()


def test_a_picture_that_is_looked_up_again_and_again_is_one_miss(
    vision_model: Path, picture: Picture
) -> None:
    engine = engine_for(vision_model)
    come = threading.Event()
    shown = picture(1)

    def load() -> PixelBuffer:
        assert come.wait(60)
        return shown

    try:
        request = ask("What?", shown, max_new_tokens=1)
        image = KnownImage(shown.sha256, shown.height, shown.width, load)
        handle = engine.submit(replace(request, images=[image]))
        until(lambda: engine.stats().waiting, 10, "it to wait for its pixels")
        come.set()
        finished(outcome_of(handle))
        stats = engine.stats()
        assert (stats.vision_misses, stats.vision_hits) == (1, 0)
        finished(outcome_of(engine.submit(ask("And?", shown, max_new_tokens=1))))
        stats = engine.stats()
        assert (stats.vision_misses, stats.vision_hits) == (1, 1)
    finally:
        come.set()
        engine.close()


def test_a_row_of_logits_does_not_keep_those_of_the_batch(text_model: Path) -> None:
    engine = engine_for(text_model)
    decoder, views = engine._family.decoder, []

    def looking(**kwargs: Any) -> Any:
        for _, generation in engine._owners.values():
            views.extend(row.base is not None for row in generation.logits)
        return decoder(**kwargs)

    engine._family.decoder = looking
    try:
        mine, _ = together(
            engine,
            ask("mine", max_new_tokens=5, ignore_eos=True, output_logits="generation"),
            ask("other", max_new_tokens=5, ignore_eos=True),
        )
        logits = finished(outcome_of(mine)).choices[0].logits
        assert logits is not None
        assert len(logits) == 5
        assert views
        assert not any(views)
    finally:
        engine.close()


def test_an_answer_that_steers_itself_by_its_text_never_waits_while_steps_are_launched_ahead(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(text_model, overlap=True)
    try:
        take_in = engine._take_in
        waits: list[bool] = []

        def noting(*, wait: bool) -> None:
            waits.append(wait and bool(engine._owners))
            take_in(wait=wait)

        monkeypatch.setattr(engine, "_take_in", noting)
        request = ask(bad_words=["zq"], max_new_tokens=20, ignore_eos=True)
        before = engine.progress
        assert finished(outcome_of(engine.submit(request))).completion_tokens == 20
        assert engine.progress - before <= 2 * 20 + 5
        assert len(waits) > 20
        assert not any(waits)
    finally:
        engine.close()
