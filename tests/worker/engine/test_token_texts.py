"""What single tokens say: together they must say what the whole says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import worker
from tests.worker.engine.models import END, IMAGE, byte_tokenizer
from visq.token_text import bytes_of
from worker.engine.loaders.sentencepiece_bpe import read_sentencepiece
from worker.engine.token_texts import TokenTexts

SMALL = Path(worker.__file__).parent / "small_model"
PIECES = Path(__file__).parent / "loaders" / "sentencepiece" / "plain.model"

TOKENIZERS: dict[str, Any] = {
    "bytes": byte_tokenizer(),
    "small": AutoTokenizer.from_pretrained(SMALL),
    "sentencepiece": PreTrainedTokenizerFast(
        tokenizer_object=read_sentencepiece(PIECES.read_bytes(), {})
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text("abc xyzé🙂\n", max_size=20))
def test_the_tokens_of_a_text_join_to_it(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = TokenTexts(tokenizer).of(ids)
    joined = b"".join(bytes_of(texts[number]) for number in ids).decode()
    if name == "sentencepiece":  # it says a space before the text
        joined = joined.removeprefix(" ")
        text = text.removeprefix(" ")
    assert joined == text


def test_special_tokens_say_their_names_and_unknown_ones_nothing() -> None:
    tokenizer = TOKENIZERS["bytes"]
    end, image = tokenizer.convert_tokens_to_ids([END, IMAGE])
    unknown = len(tokenizer) + 3
    assert TokenTexts(tokenizer).of([end, unknown, image, end]) == {
        end: END,
        image: IMAGE,
        unknown: "",
    }
