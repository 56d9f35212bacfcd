"""``repetition_ngram_size`` and ``_threshold``: stop an answer that goes round in circles.

As LMDeploy means it: the answer stops when its newest ``size`` tokens occur ``threshold`` times,
themselves included and overlaps counted, among its last `WINDOW` tokens. (LMDeploy compares by
cosine similarity, which may err; this is exact.)
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

WINDOW: Final = 1024
"""Newest tokens that are looked at; LMDeploy's default."""


class NgramRepetition:
    """Watches the generated tokens of one answer; one step costs O(size)."""

    def __init__(self, size: int, threshold: int, window: int = WINDOW) -> None:
        """
        :param size: tokens of an n-gram, at most `window`; 0 watches nothing.
        :param threshold: occurrences that stop the answer; 0 watches nothing.
        """
        self._size = size if threshold > 0 else 0
        self._threshold = threshold
        self._newest: deque[int] = deque(maxlen=self._size)
        self._grams: deque[tuple[int, ...]] = deque()  # all in the window, oldest first
        self._most = window - size + 1
        self._counts: Counter[tuple[int, ...]] = Counter()

    def append(self, token_id: int) -> bool:
        """Add the next generated token; return whether the answer must stop after it."""
        if self._size == 0:
            return False
        self._newest.append(token_id)
        if len(self._newest) < self._size:
            return False
        gram = tuple(self._newest)
        self._grams.append(gram)
        self._counts[gram] += 1
        if len(self._grams) > self._most:
            oldest = self._grams.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        return self._counts[gram] >= self._threshold
