"""What `bench.engine` asks of every system: seeded texts and pictures, the same for all."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from PIL import Image

from bench.model import WORDS


@dataclass(frozen=True, eq=False)
class Prompt:
    """One user turn."""

    text: str
    seeds: tuple[int, ...] = ()
    """Of its pictures, which stand behind the text."""
    side: int = 0

    @cached_property
    def images(self) -> list[Image.Image]:
        """Noise: as hard to compress and as cheap to encode as any picture of its size."""
        shape = (self.side, self.side, 3)
        return [
            Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Load:
    """How much is asked. The defaults are those of the published figures."""

    image_requests: int = 256
    image_side: int = 448
    image_words: int = 32
    image_new: int = 128
    text_requests: int = 64
    text_words: int = 512
    text_new: int = 256
    decode_batches: tuple[int, ...] = (64, 256)
    decode_new: int = 64
    singles: int = 5
    one_by_one: int = 6
    """Image requests for a system that answers one at a time."""
    static_batches: tuple[int, ...] = (16, 64)
    sessions: int = 3
    session_images: int = 8
    session_words: int = 1500
    session_new: int = 64

    @property
    def patches(self) -> int:
        """Of a picture (14 x 14 pixels each)."""
        return (self.image_side // 14) ** 2

    def image_prompts(self, count: int, round_number: int) -> list[Prompt]:
        """With one picture each; rounds share none, so that no cache knows them."""
        first = 100_000 * round_number
        return [
            Prompt(words(self.image_words, first + i), (first + i,), self.image_side)
            for i in range(count)
        ]

    def text_prompts(self, count: int, round_number: int) -> list[Prompt]:
        first = 10_000_000 + 100_000 * round_number
        return [Prompt(words(self.text_words, first + i)) for i in range(count)]

    def session(self, number: int) -> tuple[Prompt, Prompt]:
        """Two turns: pictures with much text, then a short question."""
        first = 20_000_000 + 1000 * number
        seeds = tuple(first + i for i in range(self.session_images))
        opening = Prompt(words(self.session_words, first), seeds, self.image_side)
        return opening, Prompt(words(self.image_words, first + 1))


def words(count: int, seed: int) -> str:
    """`count` words, each of which is one token."""
    chosen = random.Random(seed).choices(WORDS, k=count)
    return "".join(f" {word}" for word in chosen)


LOADS: Final[Mapping[str, Load]] = {
    "3b": Load(),
    "tiny": Load(
        image_requests=16,
        image_side=112,
        image_new=16,
        text_requests=8,
        text_words=64,
        text_new=16,
        decode_batches=(4, 8),
        decode_new=16,
        singles=3,
        one_by_one=4,
        static_batches=(4,),
        sessions=2,
        session_images=2,
        session_words=200,
        session_new=8,
    ),
}
