"""Handles: how the events of a request reach who waits for them."""

from __future__ import annotations

from worker.engine.face import Event, Handle, Stopped, TokenEvent

DELTA, END = TokenEvent("a", [1]), Stopped("cancelled")


def handle(*events: Event) -> Handle:
    handle = Handle(cancel=lambda: None)
    for event in events:
        handle.publish(event)
    return handle


def test_the_outcome_is_the_last_event() -> None:
    assert list(handle(DELTA, DELTA, END)) == [DELTA, DELTA, END]


def test_the_result_is_the_outcome_however_often_it_is_asked_for() -> None:
    waiting = handle(DELTA, END)
    assert waiting.result() == waiting.result() == END
    assert list(waiting) == []


def test_it_has_ended_with_its_outcome_read_or_not() -> None:
    assert not handle(DELTA).ended
    assert handle(DELTA, END).ended


def test_a_sink_gets_the_events_in_place_of_the_iterator() -> None:
    seen: list[Event] = []
    watched = Handle(lambda: None, seen.append)
    watched.publish(DELTA)
    watched.publish(END)
    assert seen == [DELTA, END]
