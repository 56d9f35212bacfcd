"""Words that are never generated: which tokens would complete one, given the text so far.

Works on text, not on one spelling of the word in tokens, so that it cannot be spelled in other
pieces. (A word in letters that the tokenizer only has as bytes can still be spelled in bytes.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property


class Pieces:
    """The text that each token of a vocabulary adds to a text."""

    def __init__(self, decode: Callable[[list[int]], str], anchor: int, size: int) -> None:
        """
        :param anchor: a token of ordinary text. Each token is decoded after it, since decoders
            drop the leading space of a text.
        :param size: number of tokens.
        """
        self._decode = decode
        self._anchor = anchor
        self._size = size

    @cached_property
    def texts(self) -> list[str]:
        """Text by token id. Takes seconds for a large vocabulary, so: once, at first use."""
        start = len(self._decode([self._anchor]))
        return [self._decode([self._anchor, token])[start:] for token in range(self._size)]

    @cached_property
    def _sorted(self) -> list[tuple[str, int]]:
        return sorted((text, token) for token, text in enumerate(self.texts) if text)

    def containing(self, word: str) -> list[int]:
        return [token for token, text in enumerate(self.texts) if word in text]

    def starting_with(self, start: str) -> list[int]:
        first = bisect_left(self._sorted, (start, -1))
        found = []
        for text, token in self._sorted[first:]:
            if not text.startswith(start):
                break
            found.append(token)
        return found


class BadWords:
    """The bad words of one request."""

    def __init__(self, words: Sequence[str], pieces: Pieces) -> None:
        self._pieces = pieces
        self._words = tuple(words)
        self._always = sorted({t for word in self._words for t in pieces.containing(word)})

    def banned(self, text: str) -> list[int]:
        """Tokens that must not come after `text`, in any order, some perhaps twice."""
        rests = {
            word[length:]
            for word in self._words
            for length in range(1, len(word))
            if text.endswith(word[:length])
        }
        completing = (token for rest in rests for token in self._pieces.starting_with(rest))
        # (For a common letter, a third of the vocabulary: to sort it would take 40 ms a step.)
        return [*self._always, *completing]
