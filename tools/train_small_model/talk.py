"""The shapes of what is asked: turns, conversations, samples, and who chooses the words."""

import random
import re
from dataclasses import dataclass

from PIL import Image

from .phrasings import ASK
from .world import Picture


@dataclass(frozen=True)
class Turn:
    """One question, its answer and the skill it needs.

    ``brings`` is the number of the sample's pictures that come with this turn and not at the start.
    """

    question: str
    answer: str
    skill: str
    brings: int = 0


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


OPENINGS = ("Please tell me: ", "Question: ", "Hi! ", "Look at the picture. ", "Please: ")


@dataclass
class Asker:
    """Chooses phrasings: those for training, or the held-out one of each skill."""

    rng: random.Random
    held_out: bool = False

    def __call__(self, skill: str, answer: str, **words: str) -> Turn:
        return Turn(self.words(skill, **words), answer, skill)

    def words(self, skill: str, **words: str) -> str:
        """A question for the skill."""
        ways = ASK[skill]
        if self.held_out:
            return with_articles(ways.held_out.format(**words))
        text = with_articles(self.rng.choice(self.rng.choice(ways.train)).format(**words))
        style = self.rng.random()
        if style < 0.1:
            text = text[0].lower() + text[1:]
        elif style < 0.14:
            text = self.rng.choice(OPENINGS) + text
        if self.rng.random() < 0.1:
            text = text.rstrip("?.!")
        return text

    def yes(self) -> bool:
        """Whether the next yes/no question shall have yes for an answer."""
        return self.rng.random() < 0.5


_VOWEL_AFTER_A = re.compile(r"\b([Aa]) (?=[aeiou])")


def with_articles(text: str) -> str:
    """``a orange ring`` becomes ``an orange ring``."""
    return _VOWEL_AFTER_A.sub(r"\1n ", text)
