"""Second questions, which mean nothing without the first, and questions on two pictures."""

import random
from collections import Counter
from dataclasses import replace

from .questions import count, describe, larger, relation
from .talk import Asker, Talk, Turn
from .world import Picture, Thing


def follow(rng: random.Random, ask: Asker, picture: Picture, turn: Turn) -> Turn | None:
    """A question that goes on from ``turn``, if there is one."""
    if turn.skill in ("count", "count shape", "count colour", "icon count", "bar count"):
        number = int(turn.answer)
        limit = max(0, number + rng.choice((-2, -1, 0, 1)))
        return ask("follow count", "yes" if number > limit else "no", n=str(limit))
    if turn.skill in ("colour", "shape") and picture.kind == "shapes":
        key = "name" if turn.skill == "colour" else "colour"
        about = [t for t in picture.things if turn.answer in (t.colour, t.name)]
        asked = turn.question.rstrip("?.").split()
        about = [t for t in about if getattr(t, key) in asked]
        return _where(ask, about)
    if turn.skill == "where":
        seen = Counter(t.phrase for t in picture.things)
        ones = [
            t
            for t in picture.things
            if t.placed_clearly and seen[t.phrase] == 1 and t.name not in turn.question
        ]
        if ones:
            other = rng.choice(ones)
            return ask("follow again", other.place, b=other.phrase)
    if turn.skill in ("icon", "icon side"):
        thing = next(t for t in picture.things if t.name == turn.answer)
        return ask("follow colour", thing.colour)
    if turn.skill in ("largest", "smallest", "beside"):
        return _where(ask, [t for t in picture.things if t.phrase == turn.answer])
    if turn.skill in ("larger", "relation"):
        return (larger if turn.skill == "larger" else relation)(ask, picture)
    return None


def _where(ask: Asker, about: list[Thing]) -> Turn | None:
    """Where it is, if it is clear what is meant and where that is."""
    if len(about) != 1 or not about[0].placed_clearly:
        return None
    return ask("follow where", about[0].place)


PAIR_SKILLS = ("pair more", "pair count", "pair colour", "pair which", "pair same")


def pair_turn(rng: random.Random, ask: Asker, first: Picture, second: Picture) -> Turn | None:
    """A question that needs both pictures to be told apart."""
    nth, picture, other = rng.choice((("first", first, second), ("second", second, first)))
    skill = rng.choice(PAIR_SKILLS)
    a, b = len(first.things), len(second.things)
    if skill == "pair more":
        return ask(skill, "the first" if a > b else "the second") if a != b else None
    if skill == "pair same":
        return ask(skill, "yes" if a == b else "no")
    if skill == "pair count":
        return ask(skill, str(len(picture.things)), nth=nth)
    if skill == "pair colour":
        names = Counter(t.name for t in picture.things)
        ones = [t for t in picture.things if names[t.name] == 1]
        if not ones:
            return None
        thing = rng.choice(ones)
        return ask(skill, thing.colour, name=thing.name, nth=nth)
    there = {t.phrase for t in other.things}
    ones = [t for t in picture.things if t.phrase not in there]
    if not ones:
        return None
    return ask(skill, f"the {nth}", thing=rng.choice(ones).phrase)


def later_talk(rng: random.Random, ask: Asker, first: Picture, second: Picture) -> Talk | None:
    """A question about a picture, and then a second picture with a question about both."""
    begun = rng.choice((count, describe))(ask, first)
    then = pair_turn(rng, ask, first, second)
    if begun is None or then is None:
        return None
    return begun, replace(then, brings=1)
