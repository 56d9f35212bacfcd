"""`read_sentencepiece` against what SentencePiece itself made of the same models and texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from visq.errors import ConfigurationError
from worker.engine.loaders.sentencepiece_bpe import read_sentencepiece

FOLDER = Path(__file__).parent / "sentencepiece"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
PLAIN = (FOLDER / "plain.model").read_bytes()
SIZE = 480


@pytest.mark.parametrize("name", EXPECTED)
def test_text_becomes_the_tokens_of_sentencepiece_and_text_again(name: str) -> None:
    tokenizer = read_sentencepiece((FOLDER / f"{name}.model").read_bytes(), {})
    assert tokenizer.get_vocab_size() == SIZE
    assert len(EXPECTED[name]) > 100
    for text, ids, decoded in EXPECTED[name]:
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids) == decoded, text


def test_an_added_token_takes_the_place_of_an_unused_piece() -> None:
    unused = read_sentencepiece(PLAIN, {}).token_to_id("[UNUSED_TOKEN_1]")
    tokenizer = read_sentencepiece(PLAIN, {unused: AddedToken("<|im_end|>", special=True)})
    assert tokenizer.get_vocab_size() == SIZE
    assert tokenizer.encode("the<|im_end|>").ids[-1] == unused
    assert unused not in tokenizer.encode("the [UNUSED_TOKEN_1]").ids


def test_further_added_tokens_follow_the_pieces() -> None:
    added = {
        SIZE + 1: AddedToken("</img>", special=True),
        SIZE: AddedToken("<img>", special=True),
    }
    tokenizer = read_sentencepiece(PLAIN, added)
    assert tokenizer.encode("<img></img>").ids == [SIZE, SIZE + 1]


def test_a_gap_before_an_added_token_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigurationError, match="<img> should have the id 481"):
        read_sentencepiece(PLAIN, {SIZE + 1: AddedToken("<img>", special=True)})


def test_an_added_token_that_is_a_piece_already_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="repeat"):
        read_sentencepiece(PLAIN, {3: AddedToken("</s>", special=True)})


@pytest.mark.parametrize("model", [b"", PLAIN[:-100], b"\xff" * 8], ids=["empty", "cut", "noise"])
def test_a_damaged_file_is_an_error(model: bytes) -> None:
    with pytest.raises(ConfigurationError, match="damaged"):
        read_sentencepiece(model, {})


def test_a_unigram_model_is_refused() -> None:
    message = PLAIN.replace(b"\x18\x02", b"\x18\x01")  # every field 3 that is 2: model_type too
    with pytest.raises(ConfigurationError, match="only SentencePiece BPE"):
        read_sentencepiece(message, {})
