"""Which tokens would complete a bad word, on a vocabulary of a few words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.bad_words import BadWords, Pieces

TEXTS = ("x", "", "c", "a", "t", "ca", "at", " cat", "cats", "dog", "tale")


def pieces() -> Pieces:
    return Pieces(lambda ids: "".join(TEXTS[i] for i in ids), anchor=0, size=len(TEXTS))


def banned(text: str, *words: str) -> set[str]:
    return {TEXTS[token] for token in BadWords(words, pieces()).banned(text)}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", {" cat", "cats"}),
        ("the c", {" cat", "cats", "at"}),
        ("the ca", {" cat", "cats", "t", "tale"}),
        ("cat", {" cat", "cats"}),
    ],
)
def test_a_word_cannot_be_completed_in_any_spelling(text: str, tokens: set[str]) -> None:
    assert banned(text, "cat") == tokens


def test_several_words_are_watched_at_once() -> None:
    assert banned("ca", "cat", "dog") == {" cat", "cats", "t", "tale", "dog"}


@given(st.lists(st.integers(1, len(TEXTS) - 1), max_size=12))
def test_an_answer_of_allowed_tokens_never_holds_the_word(wanted: list[int]) -> None:
    words, text = BadWords(["cat", "at"], pieces()), ""
    for token in wanted:
        if token not in words.banned(text):
            text += TEXTS[token]
    assert "cat" not in text
    assert "at" not in text
