"""What each token of a vocabulary says by itself, for those who read logprobs.

Not by decoding: decoders drop a leading space, and make of half a character something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from transformers.convert_slow_tokenizer import bytes_to_unicode

from visq.token_text import text_of

_BYTE_OF_LETTER: Final[dict[str, int]] = {
    letter: byte for byte, letter in bytes_to_unicode().items()
}
"""Byte-level vocabularies write each byte as a letter."""
_BYTE_PIECE: Final = re.compile("<0x([0-9A-F]{2})>")
"""How SentencePiece writes a byte that is no piece of text."""
_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""


class TokenTexts:
    """Texts by token id, as `visq.token_text` writes them. Used by one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        """:param tokenizer: transformers' tokenizer of the model."""
        self._tokenizer = tokenizer
        self._known = {
            number: str(token) for number, token in tokenizer.added_tokens_decoder.items()
        }
        self._bytes_of = _of_letters if _is_byte_level(tokenizer) else _of_piece

    def of(self, ids: Iterable[int]) -> dict[int, str]:
        """The texts of `ids`; of numbers that the tokenizer does not know, ``""``."""
        wanted = sorted(set(ids))
        new = [number for number in wanted if number not in self._known]
        for number, piece in zip(new, self._tokenizer.convert_ids_to_tokens(new), strict=True):
            self._known[number] = text_of(self._bytes_of(piece)) if piece else ""
        return {number: self._known[number] for number in wanted}


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()


def _of_letters(piece: str) -> bytes:
    return bytes(byte for letter in piece if (byte := _BYTE_OF_LETTER.get(letter)) is not None)


def _of_piece(piece: str) -> bytes:
    if found := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(found[1])
    return piece.replace(_SPACE, " ").encode()
