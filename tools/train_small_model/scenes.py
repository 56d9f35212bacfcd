"""Draws whole pictures of the small model's world, with the facts that are true of them."""

import random
from collections.abc import Sequence

from PIL import Image

from .vocabulary import COLOURS, DIGITS, HELD_OUT_WORDS, ICONS, LETTERS, SHAPES, WORDS
from .world import (
    CELLS,
    Bar,
    Canvas,
    Picture,
    Thing,
    canvas,
    draw_glyph,
    draw_shape,
    faces,
    icon_font,
    tint,
)

HUES = tuple(COLOURS)
ICON_NAMES = tuple(ICONS)
SMALLEST = 0.055

Spot = tuple[float, float, float]
"""Middle and radius."""


def _radii(rng: random.Random, n: int, low: float, high: float) -> list[float]:
    """Sizes of ``n`` things: of any kind, or with one that stands out as large or as small."""
    span = high - low
    kind = rng.random()
    if n == 1 or kind < 0.4:
        return [rng.uniform(low, high) for _ in range(n)]
    if kind < 0.7:
        sizes = [rng.uniform(low, low + 0.4 * span) for _ in range(n)]
        sizes[0] = rng.uniform(high - 0.15 * span, high)
    else:
        sizes = [rng.uniform(low + 0.6 * span, high) for _ in range(n)]
        sizes[0] = rng.uniform(low, low + 0.15 * span)
    return sizes


def _spots(rng: random.Random, radii: Sequence[float]) -> list[Spot]:
    """Places anywhere, none over another and no two middles in one cell; large ones first.

    A thing that finds no room becomes smaller, and the last ones may find none at all.
    """
    spots: list[Spot] = []
    taken: set[tuple[int, int]] = set()
    for wanted in sorted(radii, reverse=True):
        r, tries = wanted, 0
        while tries < 90:
            tries += 1
            if tries % 15 == 0:
                r = max(SMALLEST, 0.85 * r)
            x = r + 0.008 + rng.random() * (0.984 - 2 * r)
            y = r + 0.008 + rng.random() * (0.984 - 2 * r)
            cell = int(x * CELLS), int(y * CELLS)
            if cell in taken:
                continue
            if all((x - a) ** 2 + (y - b) ** 2 > (r + c + 0.012) ** 2 for a, b, c in spots):
                spots.append((x, y, r))
                taken.add(cell)
                break
    rng.shuffle(spots)
    return spots


def draw_shapes(
    rng: random.Random, most: int = 9, large: bool = False, n: int | None = None
) -> Picture:
    """One to nine shapes (or exactly ``n``); a third of the pictures keep to few names and colours.

    ``large`` ones are at most four, and reach over many tokens.
    """
    if n is None:
        n = rng.randint(1, min(4, most) if large else most)
    names, colours = SHAPES, HUES
    if n > 2 and rng.random() < 0.35:
        names = tuple(rng.sample(SHAPES, 2))
    if n > 2 and rng.random() < 0.35:
        colours = tuple(rng.sample(HUES, 2))
    if large:
        radii = _radii(rng, n, 0.12, (0.36, 0.24, 0.21, 0.2)[n - 1])
    else:
        radii = _radii(rng, n, SMALLEST, 0.16 if n < 4 else 0.14 if n < 7 else 0.12)
    on = canvas(rng)
    things = []
    for x, y, r in _spots(rng, radii):
        thing = Thing(rng.choice(names), rng.choice(colours), x, y, r)
        draw_shape(on, thing, tint(rng, thing.colour))
        things.append(thing)
    return Picture("shapes", on.image, things)


def _draw_text(rng: random.Random, kind: str, text: str) -> Picture:
    """Up to six characters in a line, no two middles in one cell."""
    on = canvas(rng)
    n = len(text)
    pitch = rng.uniform(1.001 / CELLS, max(1.001 / CELLS, min(0.2, 0.99 / n)))
    r = rng.uniform(0.05, 0.067)
    first = 0.5 * pitch + rng.random() * max(0.0, 0.999 - n * pitch)
    y = rng.uniform(0.08, 0.92)
    colour, face = rng.choice(HUES), rng.choice(faces())
    fill = tint(rng, colour)
    things = []
    for i, character in enumerate(text):
        thing = Thing(character, colour, min(0.999, first + i * pitch), y, r)
        draw_glyph(on, thing, fill, face)
        things.append(thing)
    return Picture(kind, on.image, things, text=text)


_PRINTED = tuple(word for word in WORDS if len(word) <= CELLS)
_NEVER = frozenset(HELD_OUT_WORDS)
_UNSEEN = tuple(word for word in HELD_OUT_WORDS if len(word) <= CELLS)


def _made_up(rng: random.Random) -> str:
    """Mere letters; half of them can be pronounced."""
    n = rng.randint(1, CELLS)
    if rng.random() < 0.5:
        return "".join(rng.choice(LETTERS) for _ in range(n))
    turn = rng.randrange(2)
    return "".join(
        rng.choice("aeiou" if (i + turn) % 2 else "bcdfghjklmnprstvwyz") for i in range(n)
    )


def draw_word(rng: random.Random, held_out: bool = False) -> Picture:
    """One printed word; in training often mere letters, and never a word that is held out."""
    if held_out:
        return _draw_text(rng, "word", rng.choice(_UNSEEN))
    text = rng.choice(_PRINTED)
    if rng.random() < 0.6:
        text = _made_up(rng)
    while text in _NEVER:
        text = _made_up(rng)
    return _draw_text(rng, "word", text)


def draw_number(rng: random.Random) -> Picture:
    """One printed number of one to six digits."""
    digits = rng.randint(1, CELLS)
    number = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
    return _draw_text(rng, "number", str(number))


def draw_icons(rng: random.Random) -> Picture:
    """One to four icons of different names."""
    on = canvas(rng)
    n = rng.choice((1, 1, 2, 2, 3, 4))
    high = (0.3, 0.2, 0.17, 0.15)[n - 1]
    spots = _spots(rng, [rng.uniform(0.08, high) for _ in range(n)])
    things = []
    for (x, y, r), name in zip(spots, rng.sample(ICON_NAMES, n), strict=False):
        thing = Thing(name, rng.choice(HUES), x, y, r)
        draw_glyph(on, thing, tint(rng, thing.colour), "default")
        things.append(thing)
    return Picture("icons", on.image, things)


def _fill_cell(rng: random.Random, on: Canvas, cell: int, names: Sequence[str]) -> Thing:
    """Draw one thing of these names in a cell."""
    row, column = divmod(cell, CELLS)
    name = rng.choice(names)
    r = rng.uniform(0.05, 0.08 if name in SHAPES else 0.066)
    room = max(0.0, 0.5 / CELLS - r)
    x = (column + 0.5) / CELLS + rng.uniform(-room, room)
    y = (row + 0.5) / CELLS + rng.uniform(-room, room)
    thing = Thing(name, rng.choice(HUES), x, y, r)
    if name in SHAPES:
        draw_shape(on, thing, tint(rng, thing.colour))
    else:
        draw_glyph(on, thing, tint(rng, thing.colour), rng.choice(faces()))
    return thing


def draw_mix(rng: random.Random) -> Picture:
    """A picture full of shapes, icons, letters and digits: nothing but food for the eyes."""
    on = canvas(rng)
    groups: list[Sequence[str]] = [SHAPES, LETTERS, LETTERS, DIGITS]
    if icon_font():
        groups.append(ICON_NAMES)
    cells = [cell for cell in range(CELLS * CELLS) if rng.random() < 0.55]
    return Picture(
        "mix", on.image, [_fill_cell(rng, on, cell, rng.choice(groups)) for cell in cells]
    )


BAR_UNIT = 0.11
"""Height of one unit of a chart; there is a thin line at each."""


def draw_bars(rng: random.Random) -> Picture:
    """A chart of two to six bars of values 1 to 8 over thin lines, one a unit."""
    on = canvas(rng)
    width, height = on.image.size
    n = rng.randint(2, CELLS)
    pitch = rng.uniform(1.0005 / CELLS, max(1.0005 / CELLS, min(0.25, 0.995 / n)))
    first, foot = 0.5 * pitch + rng.random() * max(0.0, 0.999 - n * pitch), 0.96
    for unit in range(1, 9):
        at = (foot - unit * BAR_UNIT) * height
        on.pen.line((0, at, width, at), fill=(205, 205, 205))
    colours, values = rng.sample(HUES, n), rng.sample(range(1, 9), n)
    half = rng.uniform(0.25, 0.44) * pitch
    bars = []
    for i, (colour, value) in enumerate(zip(colours, values, strict=True)):
        x = min(0.999, first + i * pitch)
        box = ((x - half) * width, (foot - value * BAR_UNIT) * height)
        on.pen.rectangle((*box, (x + half) * width, foot * height), fill=tint(rng, colour))
        bars.append(Bar(colour, value, x))
    thick = max(1, height // 128)
    on.pen.line((0, foot * height, width, foot * height), fill=(60, 60, 60), width=thick)
    return Picture("bars", on.image, bars=bars)


def draw_noise(rng: random.Random) -> Picture:
    """Something that is not of this world: coloured noise, a smooth blend, stripes of noise."""
    kind = rng.random()
    other = rng.choice(((1, 24), (9, 5)))
    across, down = (16, 16) if kind < 0.4 else (3, 3) if kind < 0.7 else other
    small = Image.frombytes("RGB", (across, down), rng.randbytes(3 * across * down))
    how = Image.Resampling.BICUBIC if across == 3 else Image.Resampling(rng.choice((0, 2, 3)))
    return Picture("noise", small.resize((192, 192), how))
