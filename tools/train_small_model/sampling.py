"""Joins pictures and questions into training and test samples; a pure function of the seed.

    sample(7)                        any kind, training phrasings
    sample(7, "bars", held_out=True) a chart, asked about in words never trained on

Training seeds are even and held-out seeds are odd, so the two can never meet.
"""

import random
from collections.abc import Mapping

from .questions import DRAW, MAKERS, larger, relation
from .talk import Asker, Sample, Talk, Turn
from .world import Picture, draw_shapes, draw_word, icon_font

KIND_WEIGHTS: dict[str, float] = {
    "shapes": 5.0,
    "large": 1.5,
    "word": 1.0,
    "number": 1.0,
    "icons": 1.0,
    "bars": 1.0,
    "pair": 0.7,
    "noise": 0.05,
}
"""How often each kind of picture is drawn, unless the caller says otherwise."""

FOR_THE_EYES: dict[str, float] = {
    "mix": 5.0,
    "shapes": 3.0,
    "large": 1.0,
    "word": 0.7,
    "number": 0.7,
    "icons": 1.5,
    "bars": 0.7,
}
"""The same for the first part of training, in which nothing is asked."""


MOST = 2
"""Shapes in a picture at the most, unless the caller says otherwise (up to nine)."""

MOST_ABOUT_TEXT = 3
"""There is little to ask about a word."""

ALL_KINDS = {*KIND_WEIGHTS, *FOR_THE_EYES}


def sample(
    seed: int,
    kind: str | None = None,
    *,
    held_out: bool = False,
    usual_phrasing: bool = False,
    most: int = MOST,
    questions: int = 10,
    weights: Mapping[str, float] | None = None,
) -> Sample:
    """Draw one sample: pictures of one kind, and up to ``questions`` conversations about them.

    ``held_out`` takes pictures, words and phrasings never trained on; with ``usual_phrasing`` as
    well, held-out pictures are asked about in the phrasings of training.
    """
    rng = random.Random(2 * seed + int(held_out))
    ask = Asker(rng, held_out and not usual_phrasing)
    if kind is None:
        table = {k: v for k, v in (weights or KIND_WEIGHTS).items() if k in ALL_KINDS}
        if icon_font() is None:
            table.pop("icons", None)
        kind = rng.choices(list(table), list(table.values()))[0]
    if kind == "pair":
        return _pair(rng, ask, min(most, 5), questions)
    if kind == "word":
        picture = draw_word(rng, held_out)
    elif kind in ("shapes", "large"):
        picture = draw_shapes(rng, most, kind == "large")
    else:
        picture = DRAW[kind](rng)
    return Sample(kind, [picture], _talks(rng, ask, picture, questions))


def _talks(rng: random.Random, ask: Asker, picture: Picture, questions: int) -> list[Talk]:
    """Different questions about one picture; about one conversation in eight goes on."""
    makers = MAKERS[picture.kind]
    names = list(makers)
    if picture.text:
        questions = min(questions, MOST_ABOUT_TEXT)
    weights = list(makers.values())
    talks: list[Talk] = []
    seen: set[str] = set()
    for _ in range(2 * questions if names else 0):
        turn = rng.choices(names, weights)[0](ask, picture)
        if turn is None or turn.question in seen:
            continue
        seen.add(turn.question)
        follow = _follow(rng, ask, picture, turn) if rng.random() < 0.3 else None
        talks.append((turn, follow) if follow else (turn,))
        if len(talks) == questions:
            break
    return talks


FOLLOW_SHAPE = ("And what shape is it?", "What shape is it?", "Which shape is that?")
FOLLOW_COLOUR = ("And what colour is it?", "What color is it?", "Which colour is that?")
FOLLOW_PLACE = ("And where is it?", "Where is it?", "Where is that?")
FOLLOW_MORE = ("Is that more than {n}?", "Are these more than {n}?", "Is it more than {n}?")
FOLLOW_AGAIN = ("And the {b}?", "What about the {b}?", "And what about the {b}?")


def _follow(rng: random.Random, ask: Asker, picture: Picture, turn: Turn) -> Turn | None:
    """A second question that means nothing without the first."""

    def way(ways: tuple[str, ...]) -> str:
        return ways[-1] if ask.held_out else rng.choice(ways[:-1])

    if turn.skill in ("count", "count shape", "count colour"):
        number = int(turn.answer)
        limit = max(0, number + rng.choice((-2, -1, -1, 0, 1)))
        text = way(FOLLOW_MORE).format(n=limit)
        return Turn(text, "yes" if number > limit else "no", "follow count")
    if turn.skill in ("colour", "shape") and picture.kind == "shapes":
        key = "name" if turn.skill == "colour" else "colour"
        about = [t for t in picture.things if turn.answer in (t.colour, t.name)]
        asked = turn.question.rstrip("?").split()
        about = [t for t in about if getattr(t, key) in asked]
        if len(about) == 1 and about[0].placed_clearly:
            return Turn(way(FOLLOW_PLACE), about[0].place, "follow where")
    if turn.skill == "where":
        ones = [t for t in picture.things if t.placed_clearly and t.phrase not in turn.question]
        ones = [t for t in ones if sum(o.phrase == t.phrase for o in picture.things) == 1]
        ones = [t for t in ones if t.name not in turn.question]
        if ones:
            other = rng.choice(ones)
            return Turn(way(FOLLOW_AGAIN).format(b=other.phrase), other.place, "follow again")
    if turn.skill in ("icon", "icon side"):
        thing = next(t for t in picture.things if t.name == turn.answer)
        return Turn(way(FOLLOW_COLOUR), thing.colour, "follow colour")
    if turn.skill in ("largest", "smallest", "at"):
        thing = next(t for t in picture.things if t.phrase == turn.answer)
        if turn.skill != "at" and thing.placed_clearly:
            return Turn(way(FOLLOW_PLACE), thing.place, "follow where")
    if turn.skill in ("larger", "relation"):
        return (larger if turn.skill == "larger" else relation)(ask, picture)
    return None


def _pair(rng: random.Random, ask: Asker, most: int, questions: int) -> Sample:
    """Two pictures of shapes and questions that need both to be told apart."""
    first, second = draw_shapes(rng, most), draw_shapes(rng, most)
    talks: list[Talk] = []
    seen: set[str] = set()
    for _ in range(2 * questions):
        turn = _pair_turn(rng, ask, first, second)
        if turn is not None and turn.question not in seen:
            seen.add(turn.question)
            talks.append((turn,))
        if len(talks) == min(questions, 7):
            break
    return Sample("pair", [first, second], talks)


def _pair_turn(rng: random.Random, ask: Asker, first: Picture, second: Picture) -> Turn | None:
    nth, picture, other = rng.choice((("first", first, second), ("second", second, first)))
    skill = rng.choice(("pair more", "pair count", "pair colour", "pair which"))
    if skill == "pair more":
        a, b = len(first.things), len(second.things)
        return ask(skill, "the first" if a > b else "the second") if a != b else None
    if skill == "pair count":
        return ask(skill, str(len(picture.things)), nth=nth)
    if skill == "pair colour":
        names = [t.name for t in picture.things]
        ones = [t for t in picture.things if names.count(t.name) == 1]
        if not ones:
            return None
        thing = rng.choice(ones)
        return ask(skill, thing.colour, name=thing.name, nth=nth)
    there = {t.phrase for t in other.things}
    ones = [t for t in picture.things if t.phrase not in there]
    if not ones:
        return None
    return ask(skill, f"the {nth}", thing=rng.choice(ones).phrase)


def all_texts() -> list[str]:
    """Enough sampled questions and answers to hold every word of the world.

    Printed words are left out: the model is to spell them, letter by letter.
    """
    texts: list[str] = []
    for seed in range(4000):
        for held_out in (False, True):
            for talk in sample(seed, held_out=held_out).talks:
                texts += [turn.question for turn in talk]
                texts += [turn.answer for turn in talk if turn.skill != "read word"]
    return texts
