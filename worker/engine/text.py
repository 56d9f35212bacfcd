"""From tokens to text while they come: never half a character, never a piece of a stop word.

Plain Python over strings; what an answer is made of is in `worker.engine.answer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

HALF: Final = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode the first bytes of an unfinished character to."""

MAX_HELD: Final = 8
"""Tokens held back for an unfinished character. A character has at most four bytes, a token at
least one: what is still broken after this many is broken for good, but for its newest end."""

UNFINISHED: Final = 3
"""Most bytes of an unfinished character; a tokenizer decodes each to one `HALF` at most."""


class Detokenizer:
    """Incremental decoding: each call gives the text that the newest token has made certain.

    Decodes a short window each time, not the whole answer. The window starts at the piece of text
    before the newest one, since decoders treat the start of a text differently (they drop its
    leading space).
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0  # index of the first token of the window
        self._read = 0  # index after the last token whose text is certain
        self._shown = 0  # characters of the window that were returned

    def add(self, token_id: int) -> None:
        """Add a token whose text will come with that of the next one."""
        self._ids.append(token_id)

    def append(self, token_id: int) -> str:
        """Add a token; return the new text, or ``""`` while a character is unfinished."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def advance(self) -> str:
        """Return the text of tokens that were only added, as far as it is certain."""
        return self._advance(final=False)

    def flush(self) -> str:
        """Return what was held back, finished or not."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        text = self._decode(self._ids[self._window :])
        certain = len(text)
        if text.endswith(HALF) and not final:
            if len(self._ids) - self._read <= MAX_HELD:
                return ""
            certain -= min(len(text) - len(text.rstrip(HALF)), UNFINISHED)
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if new and certain == len(text):
            self._window, self._read = self._read, len(self._ids)
            self._shown = len(self._decode(self._ids[self._window :]))
        return new


class StopWords:
    """Finds the first stop word in a text that comes in pieces.

    What it lets through never contains a stop word's beginning that may still become the word. The
    result does not depend on how the text is cut into pieces.
    """

    def __init__(self, words: Sequence[str], *, include: bool) -> None:
        """:param include: whether the stop word itself is part of the text."""
        self._words = tuple(words)
        self._include = include
        self._longest = max(map(len, self._words), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Add text; return what can be shown now, and whether a stop word ended the text."""
        if not self._words:
            return text, False
        text = self._held + text
        matches = [(at + len(word), at) for word in self._words if (at := text.find(word)) >= 0]
        if matches:
            end, start = min(matches)
            self._held = ""
            return text[: end if self._include else start], True
        hold = self._partial_match(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def flush(self) -> str:
        """Return what was held back: no stop word came of it."""
        held, self._held = self._held, ""
        return held

    def _partial_match(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop word."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(word.startswith(text[-length:]) for word in self._words):
                return length
        return 0
