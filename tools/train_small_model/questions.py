"""What may be asked about a picture of the world, with the true answers.

Every function takes an ``Asker`` and a picture and returns a ``Turn`` or ``None`` where the
question would have no clear answer.  Yes and no are drawn first and the question made to fit, so
that guessing stays at one half.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

from .offworld import off_world
from .scenes import draw_bars, draw_icons, draw_mix, draw_noise, draw_number, draw_shapes
from .talk import Asker, Turn, with_articles
from .vocabulary import COLOURS, ICONS, OTHER_THINGS, PLURAL, SHAPES, UNKNOWN
from .world import Picture, Thing

Maker = Callable[[Asker, Picture], Turn | None]
HUES = tuple(COLOURS)
ICON_NAMES = tuple(ICONS)


def _unique(things: Sequence[Thing], key: Callable[[Thing], str]) -> list[Thing]:
    """The things that ``key`` tells from all others."""
    seen = Counter(key(t) for t in things)
    return [t for t in things if seen[key(t)] == 1]


def _name(thing: Thing) -> str:
    return thing.name


def _colour(thing: Thing) -> str:
    return thing.colour


def _phrase(thing: Thing) -> str:
    return thing.phrase


def _word_for(yes: bool) -> str:
    return "yes" if yes else "no"


def count(ask: Asker, pic: Picture) -> Turn | None:
    return ask("count", str(len(pic.things)))


def _some(ask: Asker, pic: Picture, key: Callable[[Thing], str], every: Sequence[str]) -> str:
    """A value to count: mostly one that is there, sometimes any."""
    if ask.rng.random() < 0.85:
        return ask.rng.choice(sorted({key(t) for t in pic.things}))
    return ask.rng.choice(every)


def count_shape(ask: Asker, pic: Picture) -> Turn | None:
    name = _some(ask, pic, _name, SHAPES)
    found = sum(t.name == name for t in pic.things)
    return ask("count shape", str(found), shapes=PLURAL[name])


def count_colour(ask: Asker, pic: Picture) -> Turn | None:
    colour = _some(ask, pic, _colour, HUES)
    found = sum(t.colour == colour for t in pic.things)
    return ask("count colour", str(found), colour=colour)


def colour(ask: Asker, pic: Picture) -> Turn | None:
    ones = _unique(pic.things, _name)
    if not ones:
        return None
    thing = ask.rng.choice(ones)
    return ask("colour", thing.colour, name=thing.name)


def shape(ask: Asker, pic: Picture) -> Turn | None:
    ones = _unique(pic.things, _colour)
    if not ones:
        return None
    thing = ask.rng.choice(ones)
    return ask("shape", thing.name, colour=thing.colour)


def exists(ask: Asker, pic: Picture) -> Turn | None:
    there = {t.phrase for t in pic.things}
    if ask.yes():
        thing = ask.rng.choice(pic.things)
        return ask("exists", "yes", colour=thing.colour, name=thing.name)
    for _ in range(20):
        near = ask.rng.choice(pic.things)
        name, hue = ask.rng.choice(SHAPES), ask.rng.choice(HUES)
        half = ask.rng.random()
        name, hue = (
            (near.name, hue) if half < 0.4 else (name, near.colour) if half < 0.8 else (name, hue)
        )
        if f"{hue} {name}" not in there:
            return ask("exists", "no", colour=hue, name=name)
    return None


def exists_simple(ask: Asker, pic: Picture) -> Turn | None:
    """Names that are not there are mostly of this world, and mostly of this kind of picture."""
    there = {t.name for t in pic.things}
    if ask.yes():
        return ask("exists simple", "yes", name=ask.rng.choice(sorted(there)))
    kind = ask.rng.random()
    usual, other = (SHAPES, ICON_NAMES) if pic.kind == "shapes" else (ICON_NAMES, SHAPES)
    every = usual if kind < 0.7 else other if kind < 0.8 else OTHER_THINGS
    name = ask.rng.choice(every)
    return None if name in there else ask("exists simple", "no", name=name)


def is_colour(ask: Asker, pic: Picture) -> Turn | None:
    ones = _unique(pic.things, _name)
    if not ones:
        return None
    thing = ask.rng.choice(ones)
    if ask.yes():
        return ask("is colour", "yes", name=thing.name, colour=thing.colour)
    near = [t.colour for t in pic.things if t.colour != thing.colour]
    hue = ask.rng.choice(near) if near and ask.rng.random() < 0.6 else ask.rng.choice(HUES)
    if hue == thing.colour:
        return None
    return ask("is colour", "no", name=thing.name, colour=hue)


def absent(ask: Asker, pic: Picture) -> Turn | None:
    """Asked about what is not there, it says so."""
    if ask.rng.random() < 0.5:
        names = [n for n in SHAPES if all(t.name != n for t in pic.things)]
        if not names:
            return None
        name = ask.rng.choice(names)
        skill = ask.rng.choice(("colour", "where"))
        words = {"name": name} if skill == "colour" else {"thing": name}
    else:
        near = ask.rng.choice(pic.things)
        pair = (near.name, ask.rng.choice(HUES)), (ask.rng.choice(SHAPES), near.colour)
        shape_name, hue = ask.rng.choice(pair)
        if any((t.name, t.colour) == (shape_name, hue) for t in pic.things):
            return None
        name = f"{hue} {shape_name}"
        skill, words = "where", {"thing": name}
    return Turn(ask.words(skill, **words), f"There is no {name}.", "absent")


def where(ask: Asker, pic: Picture) -> Turn | None:
    ones = [t for t in _unique(pic.things, _phrase) if t.placed_clearly]
    if not ones:
        return None
    thing = ask.rng.choice(ones)
    short = thing in _unique(pic.things, _name) and ask.rng.random() < 0.5
    return ask("where", thing.place, thing=thing.name if short else thing.phrase)


def at(ask: Asker, pic: Picture) -> Turn | None:
    if not all(t.placed_clearly for t in pic.things):
        return None
    ones = _unique(pic.things, lambda t: t.place)
    if not ones:
        return None
    thing = ask.rng.choice(ones)
    return ask("at", thing.phrase, place=thing.place)


def _by_size(pic: Picture) -> list[Thing]:
    return sorted(pic.things, key=lambda t: t.r)


def largest(ask: Asker, pic: Picture) -> Turn | None:
    order = _by_size(pic)
    if len(order) < 2 or order[-1].r < 1.25 * order[-2].r:
        return None
    return ask("largest", order[-1].phrase)


def smallest(ask: Asker, pic: Picture) -> Turn | None:
    order = _by_size(pic)
    if len(order) < 2 or order[1].r < 1.25 * order[0].r:
        return None
    return ask("smallest", order[0].phrase)


def larger(ask: Asker, pic: Picture) -> Turn | None:
    ones = _unique(pic.things, _phrase)
    if len(ones) < 2:
        return None
    a, b = ask.rng.sample(ones, 2)
    if max(a.r, b.r) < 1.25 * min(a.r, b.r):
        return None
    return ask("larger", _word_for(a.r > b.r), a=a.phrase, b=b.phrase)


def _sides(a: Thing, b: Thing) -> dict[str, bool | None]:
    """For each side whether ``a`` is on it of ``b``; None where it is too close to call."""
    dx, dy = a.x - b.x, a.y - b.y
    across = None if abs(dx) < 0.1 else dx < 0
    down = None if abs(dy) < 0.1 else dy < 0
    return {
        "left of": across,
        "right of": None if across is None else not across,
        "above": down,
        "below": None if down is None else not down,
    }


def relation(ask: Asker, pic: Picture) -> Turn | None:
    ones = _unique(pic.things, _phrase)
    if len(ones) < 2:
        return None
    a, b = ask.rng.sample(ones, 2)
    clear = {side: truth for side, truth in _sides(a, b).items() if truth is not None}
    if not clear:
        return None
    side = ask.rng.choice(list(clear))
    use_names = _unique(pic.things, _name)
    short = a in use_names and b in use_names and ask.rng.random() < 0.4
    words = {"a": a.name, "b": b.name} if short else {"a": a.phrase, "b": b.phrase}
    return ask("relation", _word_for(clear[side]), side=side, **words)


def beside(ask: Asker, pic: Picture) -> Turn | None:
    if len(pic.things) != 2 or pic.things[0].phrase == pic.things[1].phrase:
        return None
    a, b = ask.rng.sample(pic.things, 2)
    clear = [side for side, truth in _sides(b, a).items() if truth]
    if not clear:
        return None
    return ask("beside", b.phrase, side=ask.rng.choice(clear), a=a.phrase)


def more(ask: Asker, pic: Picture) -> Turn | None:
    seen = Counter(t.name for t in pic.things)
    names = list(seen)
    if len(names) < 2:
        return None
    a, b = ask.rng.sample(names, 2)
    if seen[a] == seen[b]:
        return None
    return ask("more", _word_for(seen[a] > seen[b]), a=PLURAL[a], b=PLURAL[b])


def describe(ask: Asker, pic: Picture) -> Turn | None:
    """Up to four shapes or icons from left to right; of all else only what it is."""
    if pic.text:
        return ask("describe", f"A {pic.kind}.")
    if pic.bars:
        return ask("describe", f"A chart of {len(pic.bars)} bars.")
    if len(pic.things) > 4:
        return ask("describe", f"{len(pic.things)} shapes.")
    order = sorted(pic.things, key=lambda t: t.x)
    if any(b.x - a.x < 0.05 for a, b in itertools.pairwise(order)):
        return None
    text = with_articles(", ".join(f"a {t.phrase}" for t in order))
    return ask("describe", text[0].upper() + text[1:] + ".")


def read_word(ask: Asker, pic: Picture) -> Turn | None:
    return ask("read word", pic.text)


def read_number(ask: Asker, pic: Picture) -> Turn | None:
    return ask("read number", pic.text)


def text_colour(ask: Asker, pic: Picture) -> Turn | None:
    return ask("text colour", pic.things[0].colour)


def icon(ask: Asker, pic: Picture) -> Turn | None:
    if len(pic.things) == 1:
        return ask("icon", pic.things[0].name)
    order = sorted(pic.things, key=lambda t: t.x)
    sides = {}
    if order[1].x - order[0].x > 0.1:
        sides["on the left"] = order[0]
    if order[-1].x - order[-2].x > 0.1:
        sides["on the right"] = order[-1]
    if len(order) > 2 or not sides:
        return None
    side, thing = ask.rng.choice(list(sides.items()))
    return ask("icon side", thing.name, side=side)


def icon_colour(ask: Asker, pic: Picture) -> Turn | None:
    thing = ask.rng.choice(pic.things)
    return ask("icon colour", thing.colour, name=thing.name)


def icon_count(ask: Asker, pic: Picture) -> Turn | None:
    return ask("icon count", str(len(pic.things)))


def bar_tallest(ask: Asker, pic: Picture) -> Turn | None:
    return ask("bar tallest", max(pic.bars, key=lambda b: b.value).colour)


def bar_shortest(ask: Asker, pic: Picture) -> Turn | None:
    return ask("bar shortest", min(pic.bars, key=lambda b: b.value).colour)


def bar_count(ask: Asker, pic: Picture) -> Turn | None:
    return ask("bar count", str(len(pic.bars)))


def bar_value(ask: Asker, pic: Picture) -> Turn | None:
    bar = ask.rng.choice(pic.bars)
    return ask("bar value", str(bar.value), colour=bar.colour)


def bar_taller(ask: Asker, pic: Picture) -> Turn | None:
    a, b = ask.rng.sample(pic.bars, 2)
    return ask("bar taller", _word_for(a.value > b.value), a=a.colour, b=b.colour)


def unknown(ask: Asker, pic: Picture) -> Turn | None:
    return Turn(off_world(ask.rng, ask.held_out), UNKNOWN, "unknown")


NOT_TO_BE_SEEN = ("describe", "count", "read word", "icon", "colour", "where", "at", "bar tallest")


def nothing(ask: Asker, pic: Picture) -> Turn | None:
    """A question of this world on noise, or on no picture at all."""
    skill = ask.rng.choice(NOT_TO_BE_SEEN)
    thing = ask.rng.choice(SHAPES)
    place = ask.rng.choice(("top", "left", "top right", "center"))
    text = ask.words(skill, name=thing, thing=f"{ask.rng.choice(HUES)} {thing}", place=place)
    return Turn(text, UNKNOWN, "nothing")


MAKERS: dict[str, dict[Maker, float]] = {
    "shapes": {
        count: 1.5,
        count_shape: 1.5,
        count_colour: 1.2,
        colour: 1.2,
        shape: 1.2,
        exists: 0.7,
        exists_simple: 0.7,
        is_colour: 0.5,
        where: 1.5,
        at: 1.0,
        largest: 1.0,
        smallest: 0.8,
        larger: 0.6,
        relation: 0.8,
        beside: 1.2,
        more: 0.4,
        describe: 1.0,
        absent: 0.5,
        unknown: 0.5,
    },
    "word": {read_word: 2.0, text_colour: 0.4, describe: 0.2, unknown: 0.2},
    "number": {read_number: 2.0, text_colour: 0.3, describe: 0.2, unknown: 0.1},
    "icons": {
        icon: 2.0,
        icon_colour: 1.5,
        icon_count: 0.7,
        exists_simple: 1.0,
        is_colour: 0.5,
        describe: 0.7,
        unknown: 0.3,
    },
    "bars": {
        bar_tallest: 1.0,
        bar_shortest: 1.0,
        bar_count: 0.5,
        bar_value: 2.0,
        bar_taller: 1.0,
        describe: 0.3,
        unknown: 0.2,
    },
    "noise": {nothing: 1.0, unknown: 0.3},
    "mix": {},
}
"""Which questions suit which picture, and how often each is asked."""

DRAW: dict[str, Callable[[random.Random], Picture]] = {
    "shapes": draw_shapes,
    "number": draw_number,
    "icons": draw_icons,
    "bars": draw_bars,
    "noise": draw_noise,
    "mix": draw_mix,
}
