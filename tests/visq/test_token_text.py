"""Tokens as text, without a loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visq.token_text import bytes_of, text_of


@given(st.binary(max_size=8) | st.just(rb"bytes:\xe2\x80"))
def test_the_bytes_come_back(token: bytes) -> None:
    assert bytes_of(text_of(token)) == token


@given(st.binary(max_size=8))
def test_the_text_can_be_stored(token: bytes) -> None:
    assert "\0" not in text_of(token)
    text_of(token).encode()


@pytest.mark.parametrize(
    ("token", "text"),
    [(b" cat", " cat"), ("é".encode(), "é"), (b"\xe2\x80", r"bytes:\xe2\x80"), (b"", "")],
)
def test_half_a_character_is_written_as_its_bytes(token: bytes, text: str) -> None:
    assert text_of(token) == text
