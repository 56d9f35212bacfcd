"""Defects that a review found in the engine, each with the sequence of events that showed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.waiting import until
from tests.worker.engine.asking import ask, failed, finished
from tests.worker.engine.native_engines import (
    assert_nothing_is_held,
    engine_for,
    outcome_of,
)
from worker.engine import native
from worker.engine.face import Event, Outcome, Stopped, TokenEvent
from worker.engine.intake import Running
from worker.engine.scheduler import Step


def test_the_engine_lives_on_when_the_only_request_of_a_step_fails_as_it_gets_its_slot(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(text_model)
    try:
        begin = engine._sampler.begin

        def full(slot: int, params: Any, generated: Any = ()) -> None:
            monkeypatch.setattr(engine._sampler, "begin", begin)
            raise RuntimeError("it cannot begin")

        monkeypatch.setattr(engine._sampler, "begin", full)
        failed(outcome_of(engine.submit(ask())))
        assert engine.alive
        finished(outcome_of(engine.submit(ask())))
        assert_nothing_is_held(engine)
    finally:
        engine.close()


def test_a_sequence_that_comes_back_decodes_from_its_own_token_though_its_step_failed(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is driven out when all but its newest token are in full blocks, which it finds again; the
    step of its return finds no memory; so its next step is a decode, in a slot where another
    sequence was before."""
    size = 8
    request = ask("ab", max_new_tokens=60, ignore_eos=True)
    engine = engine_for(text_model, split_decodes=True, block_size=size)
    try:
        wanted = finished(engine.submit(request).result()).token_ids
        plan, launch = engine._scheduler.plan, engine._runner.launch
        decodes: list[tuple[int, int]] = []
        state = {"out": False, "failed": False}

        def planned() -> Step:
            for sequence in list(engine._scheduler.running):
                ready = sequence.length > 5 * size and sequence.length % size == 1
                if ready and not sequence.pending and not state["out"]:
                    state["out"] = True
                    engine._scheduler._preempt(sequence)
                    # Whoever had the slots before has left tokens there.
                    engine._runner._last_tokens.fill_(7)
            return plan()

        def launched(step: Step, *args: Any, **kwargs: Any) -> Any:
            if state["out"] and not state["failed"]:
                state["failed"] = True
                raise torch.OutOfMemoryError("no memory")
            decodes.extend((chunk.start, chunk.end) for chunk in step.decodes if state["failed"])
            return launch(step, *args, **kwargs)

        monkeypatch.setattr(engine._scheduler, "plan", planned)
        monkeypatch.setattr(engine._runner, "launch", launched)
        again = finished(outcome_of(engine.submit(request)))
        assert state == {"out": True, "failed": True}
        assert decodes[0][0] % size == 0, "it went on with a decode"
        assert again.token_ids == wanted
    finally:
        engine.close()


def test_what_was_generated_before_a_cancel_has_been_told(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many sequences, text is made of several tokens at a time."""
    monkeypatch.setattr(native, "HELD_PER", 1)
    engine = engine_for(text_model)
    events: list[Event] = []

    def told() -> list[int]:
        return [token for e in events if isinstance(e, TokenEvent) for token in e.token_ids]

    generated: list[int] = []
    end = engine._end_request

    def noted(running: Running, outcome: Outcome) -> None:
        if isinstance(outcome, Stopped) and not generated:
            generated.extend(running.generations[0].answer.token_ids)
        end(running, outcome)

    monkeypatch.setattr(engine, "_end_request", noted)
    try:
        handle = engine.submit(ask(max_new_tokens=90, ignore_eos=True), events.append)
        others = [engine.submit(ask(max_new_tokens=90, ignore_eos=True)) for _ in range(8)]
        until(lambda: len(told()) > 10, 20, "some tokens")
        handle.cancel()
        for other in others:
            other.cancel()
            other.result()
        until(lambda: handle.ended, 20, "the request to end")
        assert isinstance(events[-1], Stopped)
        assert told() == generated
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("blocks", "widths"), [(3, {16}), (16, {16}), (17, {16, 64}), (64, {16, 64}), (500, {16, 64})]
)
def test_what_is_made_at_the_start_covers_the_contexts_that_a_model_has(
    text_model: Path, blocks: int, widths: set[int]
) -> None:
    engine = engine_for(text_model, split_decodes=True)
    try:
        decoder = engine._runner.decoder
        assert decoder is not None
        decoder.warm_up(5, blocks * engine._cache.block_size)
        assert {width for _, width in decoder._ready} == widths
        assert {count for count, width in decoder._ready if width == 16} == {1, 2, 4, 8}
    finally:
        engine.close()
