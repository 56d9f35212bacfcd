"""One answer as it grows, without a model: a token is a byte."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.engine.models import END, byte_tokenizer
from visq.types import GenerationConfig
from worker.engine.answer import Answer
from worker.engine.face import Choice, TokenEvent

BYTES = byte_tokenizer()
END_ID = BYTES.convert_tokens_to_ids(END)


def tokens(text: str) -> list[int]:
    return [int(token) for token in BYTES.encode(text)]


def decode(ids: list[int]) -> str:
    return str(BYTES.decode(ids, skip_special_tokens=True))


def feed(ids: list[int], **fields: Any) -> tuple[list[TokenEvent], Choice]:
    """Give `ids` to an answer until it stops."""
    config = GenerationConfig(**fields)
    answer = Answer(config, decode, {END_ID}, config.stop_words or [])
    events = []
    for token in ids:
        events.append(answer.append(token))
        if answer.stopped:
            break
    last, finished = answer.finish()
    return [event for event in [*events, last] if event is not None], finished


@given(
    st.lists(st.sampled_from([*tokens("ab \n🙂é"), END_ID]), max_size=30),
    st.lists(st.text("ab 🙂", min_size=1, max_size=3), max_size=2),
    st.booleans(),
    st.integers(0, 5),
)
def test_the_events_make_the_answer_whatever_comes(
    ids: list[int], words: list[str], include: bool, least: int
) -> None:
    events, finished = feed(
        ids, stop_words=words, include_stop_str_in_output=include, min_new_tokens=least
    )
    assert "".join(event.text for event in events) == finished.text
    assert [token for event in events for token in event.token_ids] == finished.token_ids


@given(st.text("ab é🙂", max_size=20))
def test_no_event_but_the_last_has_half_a_character(text: str) -> None:
    events, finished = feed([*tokens(text), END_ID])
    assert finished.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in event.text for event in events)


def test_the_end_token_is_no_part_of_the_answer() -> None:
    _, finished = feed([*tokens("ab"), END_ID, *tokens("c")])
    assert finished == Choice("ab", "stop", tokens("ab"))


def test_without_a_stop_the_answer_ended_by_its_length() -> None:
    _, finished = feed(tokens("ab"))
    assert finished.finish_reason == "length"


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
def test_after_a_stop_word_nothing_is_shown(include: bool, text: str) -> None:
    _, finished = feed(tokens("abc"), stop_words=["b"], include_stop_str_in_output=include)
    assert finished == Choice(text, "stop", tokens("ab"))


def test_the_beginning_of_a_stop_word_is_shown_if_the_end_token_comes_first() -> None:
    _, finished = feed([*tokens("a ST"), END_ID], stop_words=["STOP"])
    assert finished.text == "a ST"


def test_a_stop_word_before_min_new_tokens_is_text() -> None:
    _, finished = feed(tokens("a.b.c"), stop_words=["."], min_new_tokens=3)
    assert finished.text == "a.b"


@given(st.text("ab é🙂", min_size=1, max_size=20), st.integers(0, 60), st.integers(1, 5))
def test_what_has_come_before_an_end_from_outside_is_told_half_characters_too(
    text: str, count: int, hold: int
) -> None:
    ids = tokens(text)[:count]
    answer = Answer(GenerationConfig(), decode, {END_ID}, [])
    events = [answer.append(token, hold=hold) for token in ids]
    told = [event for event in [*events, answer.held()] if event is not None]
    assert [token for event in told for token in event.token_ids] == ids
    assert text.startswith("".join(event.text for event in told))
    assert answer.held() is None


def test_of_every_token_in_the_log_probabilities_the_text_is_told() -> None:
    answer = Answer(
        GenerationConfig(logprobs=1),
        decode,
        {END_ID},
        [],
        texts_of=lambda ids: dict.fromkeys(ids, "?"),
    )
    for token in tokens("ab"):
        answer.append(token, {token: -0.5, 7: -1.0})
    _, finished = answer.finish()
    assert finished.tokens == dict.fromkeys([*tokens("ab"), 7], "?")
