"""Joins pictures and questions into training and test samples; a pure function of the seed.

    sample(7)                        any kind, training phrasings
    sample(7, "bars", held_out=True) a chart, asked about in words never trained on

Training seeds are even and held-out seeds are odd, so the two can never meet.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from .following import follow, later_talk, pair_turn
from .questions import DRAW, MAKERS, Maker, nothing, unknown
from .scenes import draw_shapes, draw_word
from .talk import Asker, Sample, Talk
from .world import Picture, icon_font

MOST = 9
"""Shapes in a picture at the most, unless the caller says otherwise."""

MOST_ABOUT_TEXT = 3
"""There is little to ask about a word."""

KIND_WEIGHTS: dict[str, float] = {
    "shapes": 5.0,
    "large": 1.0,
    "word": 2.5,
    "number": 1.0,
    "icons": 1.0,
    "bars": 1.2,
    "pair": 1.2,
    "later": 0.25,
    "noise": 0.2,
    "none": 0.1,
}
"""How often each kind of picture is drawn, unless the caller says otherwise."""

FOR_THE_EYES: dict[str, float] = {
    "mix": 5.0,
    "shapes": 3.0,
    "large": 1.0,
    "word": 0.7,
    "number": 0.4,
    "icons": 1.2,
    "bars": 0.9,
}
"""The same for the first part of training, in which nothing is asked."""


@dataclass
class Steering:
    """What to draw and to ask just now; the trainer writes it, the drawing processes read it.

    ``skills`` says how much more often than usual to ask for a skill.
    """

    eyes: bool = False
    most: int = MOST
    kinds: dict[str, float] = field(default_factory=dict)
    skills: dict[str, float] = field(default_factory=dict)

    @cached_property
    def makers(self) -> Mapping[str, tuple[list[Maker], list[float]]]:
        """For each kind of picture what may be asked, and the running sum of how often."""
        return {
            kind: (
                list(makers),
                list(
                    accumulate(
                        often * self.skills.get(skill_of(maker), 1.0)
                        for maker, often in makers.items()
                    )
                ),
            )
            for kind, makers in MAKERS.items()
        }

    @cached_property
    def table(self) -> tuple[list[str], list[float]]:
        """Kinds of pictures, and the running sum of how often each is drawn."""
        if self.eyes:
            weights = dict(FOR_THE_EYES)
        else:
            base = self.kinds or KIND_WEIGHTS
            weights = {kind: often * self._need(kind) for kind, often in base.items()}
        if icon_font() is None:
            weights.pop("icons", None)
        return list(weights), list(accumulate(weights.values()))

    def _need(self, kind: str) -> float:
        """How much more often than usual the skills of this kind shall be asked for."""
        if not self.skills:
            return 1.0
        if kind in ("pair", "later"):
            found = [v for skill, v in self.skills.items() if skill.startswith("pair")]
            return sum(found) / len(found) if found else 1.0
        makers = MAKERS.get("shapes" if kind == "large" else kind, {nothing: 1.0})
        return sum(
            often * self.skills.get(skill_of(maker), 1.0) for maker, often in makers.items()
        ) / max(1e-9, sum(makers.values()))

    def write(self, path: Path) -> None:
        """Replace the file, in one piece."""
        path.with_suffix(".new").write_text(json.dumps(asdict(self), indent=1) + "\n")
        path.with_suffix(".new").replace(path)

    @classmethod
    def read(cls, path: Path) -> "Steering":
        """What the file says; the defaults if there is none."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError):
            return cls()


def skill_of(maker: Maker) -> str:
    """The name of the skill that a maker asks for."""
    return maker.__name__.replace("_", " ")


USUAL = Steering()


def sample(
    seed: int,
    kind: str | None = None,
    *,
    held_out: bool = False,
    usual_phrasing: bool = False,
    most: int | None = None,
    questions: int = 10,
    steering: Steering = USUAL,
) -> Sample:
    """Draw one sample: pictures of one kind, and up to ``questions`` conversations about them.

    ``held_out`` takes pictures, words and phrasings never trained on; with ``usual_phrasing`` as
    well, held-out pictures are asked about in the phrasings of training.
    """
    rng = random.Random(2 * seed + int(held_out))
    ask = Asker(rng, held_out and not usual_phrasing)
    most = steering.most if most is None else most
    if kind is None:
        kinds, often = steering.table
        kind = rng.choices(kinds, cum_weights=often)[0]
    if kind in ("pair", "later"):
        return _pair(rng, ask, min(most, 5), questions, later=kind == "later")
    if kind == "none":
        turns = [rng.choice((nothing, unknown))(ask, _NO_PICTURE) for _ in range(min(2, questions))]
        return Sample(kind, [], [(turn,) for turn in turns if turn])
    if kind == "word":
        picture = draw_word(rng, held_out)
    elif kind in ("shapes", "large"):
        picture = draw_shapes(rng, most, kind == "large")
    else:
        picture = DRAW[kind](rng)
    return Sample(kind, [picture], _talks(rng, ask, picture, questions, steering))


_NO_PICTURE = Picture("none", None)  # type: ignore[arg-type]


def _talks(
    rng: random.Random, ask: Asker, picture: Picture, questions: int, steering: Steering
) -> list[Talk]:
    """Different questions about one picture; about one conversation in six goes on."""
    if picture.kind == "mix":
        return []
    makers, often = steering.makers[picture.kind]
    if picture.text:
        questions = min(questions, MOST_ABOUT_TEXT)
    elif picture.kind == "noise":
        questions = min(questions, 4)
    talks: list[Talk] = []
    seen: set[str] = set()
    for maker in rng.choices(makers, cum_weights=often, k=2 * questions):
        turn = maker(ask, picture)
        if turn is None or turn.question in seen:
            continue
        seen.add(turn.question)
        then = follow(rng, ask, picture, turn) if rng.random() < 0.3 else None
        talks.append((turn, then) if then else (turn,))
        if len(talks) == questions:
            break
    return talks


def _pair(rng: random.Random, ask: Asker, most: int, questions: int, later: bool) -> Sample:
    """Two pictures of shapes, of equally many in four samples of ten."""
    first = draw_shapes(rng, most)
    n = len(first.things) if rng.random() < 0.4 else None
    second = draw_shapes(rng, most, n=n)
    if later:
        talk = later_talk(rng, ask, first, second)
        return Sample("later", [first, second], [talk] if talk and questions else [])
    talks: list[Talk] = []
    seen: set[str] = set()
    for _ in range(2 * questions):
        turn = pair_turn(rng, ask, first, second)
        if turn is not None and turn.question not in seen:
            seen.add(turn.question)
            talks.append((turn,))
        if len(talks) == min(questions, 7):
            break
    return Sample("pair", [first, second], talks)


def all_texts() -> list[str]:
    """Enough sampled questions and answers to hold every word of the world.

    Left out are printed words, which the model is to spell letter by letter, and what is not of
    the world, so that it learns to not know words that it never met.
    """
    texts: list[str] = []
    for seed in range(6000):
        for held_out in (False, True):
            for talk in sample(seed, held_out=held_out).talks:
                known = [turn for turn in talk if turn.skill != "unknown"]
                texts += [turn.question for turn in known]
                texts += [turn.answer for turn in known if turn.skill != "read word"]
    return texts
