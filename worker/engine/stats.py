"""What an engine holds and has done: numbers for people, `/metrics` and tests."""

from __future__ import annotations

from dataclasses import dataclass


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
    first_token_seconds: float
    """Sum over requests of the time from submit to the first token."""
    first_tokens: int
    token_seconds: float
    """Sum over requests of the time from the first token to the last."""


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
    first_token_seconds: float = 0.0
    first_tokens: int = 0
    token_seconds: float = 0.0
