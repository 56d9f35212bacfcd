"""Incremental decoding and stop words, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tests.worker.engine.models import byte_tokenizer
from worker.engine.text import HALF, Detokenizer, StopWords

BYTES = byte_tokenizer()
ALPHABET = st.text(alphabet="aé你🙂 \n", max_size=30)


def decode(ids: list[int]) -> str:
    return str(BYTES.decode(ids, skip_special_tokens=True))


@given(ALPHABET)
def test_the_pieces_of_a_text_are_whole_characters_and_make_the_text(text: str) -> None:
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.append(token) for token in BYTES.encode(text)]
    assert not any(HALF in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_special_tokens_between_words_do_not_swallow_the_space_after_them() -> None:
    """Decoders of the SentencePiece kind drop the leading space of what they are given."""
    vocab = [("<unk>", 0.0), ("<sep>", 0.0), ("▁one", -1.0), ("▁two", -1.0)]
    core = Tokenizer(models.Unigram(vocab, unk_id=0))
    core.add_special_tokens(["<sep>"])
    core.decoder = decoders.Metaspace()
    ids = [2, 1, 1, 3, 2]
    detokenizer = Detokenizer(lambda ids: str(core.decode(ids)))
    pieces = [detokenizer.append(token) for token in ids]
    assert "".join(pieces) == core.decode(ids) == "one two one"


def test_an_unfinished_character_at_the_end_is_shown_by_the_flush() -> None:
    detokenizer = Detokenizer(decode)
    first, second, _ = BYTES.encode("你")
    assert detokenizer.append(first) == detokenizer.append(second) == ""
    assert detokenizer.flush() == HALF


def test_bytes_that_never_make_a_character_do_not_hold_the_text_back_for_ever() -> None:
    detokenizer = Detokenizer(decode)
    broken = BYTES.encode("你")[1]
    assert any(HALF in detokenizer.append(broken) for _ in range(20))


@given(st.lists(st.sampled_from(BYTES.encode("aé你🙂\n")), max_size=40))
def test_whatever_bytes_come_the_pieces_make_the_text(ids: list[int]) -> None:
    """A model may break a character off at any byte, and go on for long with broken ones."""
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.append(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == decode(ids)


def run(words: list[str], pieces: list[str], *, include: bool = False) -> tuple[str, bool]:
    stop_words, shown = StopWords(words, include=include), ""
    for piece in pieces:
        new, hit = stop_words.feed(piece)
        shown += new
        if hit:
            return shown, True
    return shown + stop_words.flush(), False


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one STOP")])
def test_a_stop_word_over_several_pieces_ends_the_text(include: bool, text: str) -> None:
    assert run(["STOP"], ["one S", "TO", "P two"], include=include) == (text, True)


def test_the_beginning_of_a_stop_word_is_held_back_until_it_is_sure_that_it_is_none() -> None:
    stop_words = StopWords(["STOP"], include=False)
    assert stop_words.feed("a STO") == ("a ", False)
    assert stop_words.feed("RY") == ("STORY", False)


def test_text_that_ends_inside_a_stop_word_is_shown_in_the_end() -> None:
    assert run(["STOP"], ["a ST"]) == ("a ST", False)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text("abc", max_size=20),
    st.booleans(),
    st.data(),
)
def test_how_a_text_is_cut_into_pieces_changes_nothing(
    words: list[str], text: str, include: bool, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(text)))
    one_by_one = run(words, list(text), include=include)
    assert run(words, [text[:cut], text[cut:]], include=include) == one_by_one
    assert one_by_one[1] == any(word in text for word in words)
