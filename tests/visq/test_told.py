"""What a reader is told over several attempts is one text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visq.told import Told, ToldOtherwise


@given(st.lists(st.lists(st.text("ab", max_size=3), max_size=5), max_size=3), st.text("ab"))
def test_attempts_that_say_the_same_are_told_once(attempts: list[list[str]], text: str) -> None:
    """Each attempt dies somewhere in `text`; the last one ends."""
    told, known = Told(), ""
    for pieces in attempts:
        told.begin()
        left = text
        for piece in pieces:
            said, left = left[: len(piece)], left[len(piece) :]
            known += told.say(said)
            assert text.startswith(known)
    assert known + told.end(text) == text


def test_an_attempt_that_says_otherwise_is_an_end_or_a_new_beginning() -> None:
    told = Told()
    told.say("a red ")
    told.begin()
    assert told.say("a ") == ""
    with pytest.raises(ToldOtherwise):
        told.say("blue ")
    assert told.start_over() == "a blue "
    assert told.say("cat") == "cat"


def test_a_whole_answer_that_is_shorter_than_what_was_told_is_otherwise() -> None:
    told = Told()
    told.say("a red cat")
    with pytest.raises(ToldOtherwise):
        told.end("a red")


def test_white_space_at_the_end_does_not_count() -> None:
    told = Told()
    told.say("a cat ")
    assert told.end("a cat") == ""


def test_what_the_stream_lacked_comes_with_the_end() -> None:
    told = Told()
    told.say("a ")
    assert told.end("a cat\n") == "cat\n"
