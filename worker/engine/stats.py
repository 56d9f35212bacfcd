"""What an engine holds and has done: numbers for people, `/metrics` and tests."""

from __future__ import annotations

from bisect import bisect_left
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any, Final

FIRST_TOKEN_BOUNDS: Final = (
    0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0,
)  # fmt: skip
"""Seconds; dense where a person at a chat notices."""

TOKEN_BOUNDS: Final = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0,
)  # fmt: skip
"""Seconds; from the speed of one sequence alone on a large GPU to that of a crowded CPU."""


@dataclass(slots=True)
class Histogram:
    """How many observations were up to each bound, and their sum."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    """One for each bound (those above the bound before, up to this one), then the rest."""
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges are of now, counters since the start."""

    queued: int
    """Requests that are not prepared yet."""
    waiting: int
    """Sequences that are prepared and not admitted."""
    running: int
    """Sequences in the running batch."""
    preemptions: int
    total_blocks: int
    held_blocks: int
    """Blocks that running sequences hold."""
    available_blocks: int
    """Blocks that are free, or cached and can be evicted."""
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Those of them that were found."""
    host_blocks: int
    """Blocks that the memory of the host has room for; 0: none are kept there."""
    host_used_blocks: int
    host_hits: int
    """Blocks that were copied back from there."""
    vision_bytes: int
    vision_hits: int
    vision_misses: int
    steps: int
    step_tokens: int
    """Tokens that were computed."""
    generated_tokens: int
    encoded_images: int
    vision_seconds: float
    requests: int
    """Requests submitted."""
    finished: int
    """Requests that ended with an answer."""
    first_token: Histogram
    """Of requests: seconds from submit to the first token."""
    per_token: Histogram
    """Of answered requests: seconds from the first token to the last, divided by the tokens after
    the first (of the longest choice)."""


@dataclass(slots=True)
class Counters:
    """What is counted on the way; the names are `EngineStats`'."""

    steps: int = 0
    step_tokens: int = 0
    generated_tokens: int = 0
    encoded_images: int = 0
    vision_seconds: float = 0.0
    requests: int = 0
    finished: int = 0
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    per_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))

    def snapshot(self) -> dict[str, Any]:
        """The values of now, which change no more."""
        return {each.name: deepcopy(getattr(self, each.name)) for each in fields(self)}
