"""The shapes of what is asked: turns, conversations, samples, and who chooses the words."""

import random
import re
from dataclasses import dataclass

from PIL import Image

from .vocabulary import ASK
from .world import Picture


@dataclass(frozen=True)
class Turn:
    """One question, its answer and the skill it needs."""

    question: str
    answer: str
    skill: str


Talk = tuple[Turn, ...]
"""A conversation; most are one turn long."""


@dataclass
class Sample:
    """One or two images (or none) and independent conversations about them."""

    kind: str
    pictures: list[Picture]
    talks: list[Talk]

    @property
    def images(self) -> list[Image.Image]:
        """What the pictures look like."""
        return [picture.image for picture in self.pictures]


@dataclass
class Asker:
    """Chooses phrasings: those for training, or the held-out one of each skill."""

    rng: random.Random
    held_out: bool = False

    def __call__(self, skill: str, answer: str, **words: str) -> Turn:
        ways = ASK[skill]
        text = ways[-1] if self.held_out else self.rng.choice(ways[:-1])
        text = with_articles(text.format(**words))
        if not self.held_out:
            if self.rng.random() < 0.1:
                text = text[0].lower() + text[1:]
            if self.rng.random() < 0.1:
                text = text[:-1]
        return Turn(text, answer, skill)

    def yes(self) -> bool:
        """Whether the next yes/no question shall have yes for an answer."""
        return self.rng.random() < 0.5


def with_articles(text: str) -> str:
    """``a orange ring`` becomes ``an orange ring``."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
