"""Answers that repeat themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.repetition import WINDOW, NgramRepetition


def stops_after(tokens: list[int], size: int, threshold: int, window: int) -> list[bool]:
    """By the definition, from scratch after each token."""
    if size == 0 or threshold == 0:
        return [False] * len(tokens)
    stops = []
    for end in range(1, len(tokens) + 1):
        seen = tokens[max(0, end - window) : end]
        starts = range(len(seen) - size + 1)
        count = sum(seen[start : start + size] == seen[-size:] for start in starts)
        stops.append(count >= threshold)
    return stops


@given(
    tokens=st.lists(st.integers(0, 2), max_size=60),
    size=st.integers(0, 5),
    threshold=st.integers(0, 6),
    window=st.integers(5, 30),
)
def test_it_stops_exactly_when_the_newest_ngram_has_come_often_enough(
    tokens: list[int], size: int, threshold: int, window: int
) -> None:
    watch = NgramRepetition(size, threshold, window)
    assert [watch.append(token) for token in tokens] == stops_after(tokens, size, threshold, window)


def test_a_loop_of_three_tokens_stops_at_its_fourth_round() -> None:
    watch = NgramRepetition(3, 4)
    stops = [watch.append(token) for token in [9, 8, *[1, 2, 3] * 5]]
    assert stops.index(True) == 2 + 3 * 4 - 1


def test_repeats_further_apart_than_the_window_do_not_count() -> None:
    watch = NgramRepetition(2, 2)
    tokens = [1, 2, *range(10, 10 + WINDOW), 1, 2]
    assert not any(watch.append(token) for token in tokens)
