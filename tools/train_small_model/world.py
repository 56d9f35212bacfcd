"""Draws the small model's world: a picture, and the facts that are true of it.

Needs only Pillow.  Everything is a pure function of a ``random.Random``, so the same seed gives the
same picture.  What may be asked about a picture is in ``questions.py``; ``sample`` joins the two:

    sample(seed)  ->  Sample(images, talks)       e.g. a 256x256 picture of five shapes, and
                                                  ten conversations about it, each with its skill

The model sees a picture as 4 x 4 tokens.  No token's part of the picture holds the middle of more
than one thing, so that nothing is lost where eyes and tongue meet.

Icons come from the pip package ``fontawesomefree`` (training only); without it, icon pictures
cannot be drawn and every other kind still can.
"""

import importlib.util
import math
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .vocabulary import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    HELD_OUT_WORDS,
    ICONS,
    LETTERS,
    PLACES,
    SHAPES,
    WORDS,
)

Colour = tuple[int, int, int]
CANVAS_SIZES = (128, 160, 192, 256, 320)
"""Side lengths to draw at; the model's processor brings each to its own size."""

DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
"""Where Debian keeps DejaVu; used when it is there."""


@dataclass(frozen=True)
class Thing:
    """One shape, icon, letter or digit; places and sizes are fractions of the picture's side."""

    name: str
    colour: str
    x: float
    y: float
    r: float

    @property
    def phrase(self) -> str:
        """The thing as a person names it: colour, then name."""
        return f"{self.colour} {self.name}"

    @property
    def place(self) -> str:
        """Which of the nine parts of the picture its middle is in."""
        return PLACES[_third(self.y)][_third(self.x)]

    @property
    def placed_clearly(self) -> bool:
        """False where a person could argue about ``place``."""
        edges = (1 / 3, 2 / 3)
        return all(abs(v - edge) > 0.025 for v in (self.x, self.y) for edge in edges)


@dataclass(frozen=True)
class Bar:
    """One bar of a chart; its value is a whole number from 1 to 8, its foot is at ``x``."""

    colour: str
    value: int
    x: float


@dataclass
class Picture:
    """An image with the facts that questions are made from."""

    kind: str
    image: Image.Image
    things: list[Thing] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    text: str = ""


def _third(v: float) -> int:
    return min(2, max(0, int(v * 3)))


def _tint(rng: random.Random, name: str) -> Colour:
    """The named colour, a little off, as real pictures are."""
    r, g, b = (min(255, max(0, c + rng.randint(-14, 14))) for c in COLOURS[name])
    return r, g, b


def _polygon(name: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of the shapes that are polygons, of circumscribed radius ``r``."""

    def ring(n: int, turn: float, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
        return [
            (
                x + r * radii[i % len(radii)] * math.cos(turn + 2 * math.pi * i / n),
                y + r * radii[i % len(radii)] * math.sin(turn + 2 * math.pi * i / n),
            )
            for i in range(n)
        ]

    if name == "square":
        return ring(4, math.pi / 4)
    if name == "diamond":
        return [(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)]
    if name == "triangle":
        return ring(3, -math.pi / 2)
    if name == "star":
        return ring(10, -math.pi / 2, (1.0, 0.42))
    if name == "cross":
        a = 0.32
        corners = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a)]
        corners += [(-1.0, a), (-1.0, -a), (-a, -a)]
        return [(x + 0.92 * r * i, y + 0.92 * r * j) for i, j in corners]
    heart = []
    for i in range(24):
        t = 2 * math.pi * i / 24
        across = 16 * math.sin(t) ** 3
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        heart.append((x + across * r / 17, y - (up + 2.5) * r / 17))
    return heart


def draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, side: int, fill: Colour) -> None:
    """Draw one shape onto a picture of the given side."""
    x, y, r = thing.x * side, thing.y * side, thing.r * side
    if thing.name == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.name == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, round(r * 0.3)))
    else:
        draw.polygon(_polygon(thing.name, x, y, r), fill=fill)


def _canvas(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    side = rng.choice(CANVAS_SIZES)
    image = Image.new("RGB", (side, side), rng.choice(BACKGROUNDS))
    return image, ImageDraw.Draw(image), side


CELLS = 4
"""Image tokens in a row of the picture, and in a column."""

Spot = tuple[float, float, float]
"""Middle and radius."""


def _cell_spot(rng: random.Random, cell: int, across: int, r: float) -> Spot:
    """A place for something of radius ``r`` inside one of ``across * across`` cells."""
    room = max(0.0, 0.5 / across - r - 0.005)
    row, column = divmod(cell, across)
    x = (column + 0.5) / across + rng.uniform(-room, room)
    return x, (row + 0.5) / across + rng.uniform(-room, room), r


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


def _spots(rng: random.Random, n: int) -> list[Spot]:
    """``n`` places in different cells of a grid of 4 x 4, each big enough for its thing."""
    cells = rng.sample(range(CELLS * CELLS), n)
    return [
        _cell_spot(rng, cell, CELLS, r)
        for cell, r in zip(cells, _radii(rng, n, 0.075, 0.118), strict=True)
    ]


def _large_spots(rng: random.Random, n: int) -> list[Spot]:
    """One large place anywhere, or up to four on a grid of 2 x 2."""
    if n == 1:
        r = rng.uniform(0.12, 0.34)
        return [(rng.uniform(r + 0.01, 0.99 - r), rng.uniform(r + 0.01, 0.99 - r), r)]
    return [
        _cell_spot(rng, cell, 2, r)
        for cell, r in zip(rng.sample(range(4), n), _radii(rng, n, 0.12, 0.22), strict=True)
    ]


def draw_shapes(rng: random.Random, most: int = 9, large: bool = False) -> Picture:
    """One to nine shapes; a third of the pictures keep to few names and colours.

    ``large`` ones are at most four, and reach over many tokens.
    """
    n = rng.randint(1, min(4, most) if large else most)
    names, colours = list(SHAPES), list(COLOURS)
    if n > 2 and rng.random() < 0.35:
        names = rng.sample(names, 2)
    if n > 2 and rng.random() < 0.35:
        colours = rng.sample(colours, 2)
    image, draw, side = _canvas(rng)
    things = []
    for x, y, r in _large_spots(rng, n) if large else _spots(rng, n):
        thing = Thing(rng.choice(names), rng.choice(colours), x, y, r)
        draw_shape(draw, thing, side, _tint(rng, thing.colour))
        things.append(thing)
    return Picture("shapes", image, things)


@lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "default":
        found = ImageFont.load_default(size)
        assert isinstance(found, ImageFont.FreeTypeFont)
        return found
    return ImageFont.truetype(name, size)


@lru_cache(maxsize=1)
def _font_names() -> tuple[str, ...]:
    """Pillow's own font, and two faces of DejaVu where the machine has them."""
    faces = ("DejaVuSans", "DejaVuSans-Bold")
    here = tuple(str(DEJAVU / f"{face}.ttf") for face in faces if (DEJAVU / f"{face}.ttf").exists())
    return ("default", *here)


@lru_cache(maxsize=1)
def icon_font() -> str | None:
    """The file of Font Awesome Free Solid, if its package is installed."""
    package = importlib.util.find_spec("fontawesomefree")
    if package is None or not package.submodule_search_locations:
        return None
    root = Path(package.submodule_search_locations[0])
    return str(next(root.rglob("fa-solid-900.ttf")))


def draw_glyph(draw: ImageDraw.ImageDraw, thing: Thing, side: int, fill: Colour, face: str) -> None:
    """Draw an icon, or a letter (as a capital) or digit in the given face, around its middle."""
    if thing.name in ICONS:
        icons = icon_font()
        if icons is None:
            raise RuntimeError("icon pictures need the package fontawesomefree")
        font, text = _font(icons, max(8, int(1.7 * thing.r * side))), chr(ICONS[thing.name])
    else:
        font, text = _font(face, max(8, int(2.4 * thing.r * side))), thing.name.upper()
    left, top, right, bottom = font.getbbox(text)
    origin = (thing.x * side - (left + right) / 2, thing.y * side - (top + bottom) / 2)
    draw.text(origin, text, font=font, fill=fill)


def _draw_text(rng: random.Random, kind: str, text: str) -> Picture:
    """Up to four characters in a line, each in a cell of its own."""
    image, draw, side = _canvas(rng)
    start = CELLS * rng.randrange(CELLS) + rng.randint(0, CELLS - len(text))
    colour, face = rng.choice(list(COLOURS)), rng.choice(_font_names())
    fill, r = _tint(rng, colour), rng.uniform(0.078, 0.092)
    down = rng.uniform(-0.02, 0.02)
    things = []
    for i, character in enumerate(text):
        row, column = divmod(start + i, CELLS)
        x, y = (column + 0.5) / CELLS + rng.uniform(-0.012, 0.012), (row + 0.5) / CELLS + down
        thing = Thing(character, colour, x, y, r)
        draw_glyph(draw, thing, side, fill, face)
        things.append(thing)
    return Picture(kind, image, things, text=text)


def draw_word(rng: random.Random, held_out: bool = False) -> Picture:
    """One printed word; in training often mere letters, and never a word that is held out."""
    if held_out:
        return _draw_text(rng, "word", rng.choice(HELD_OUT_WORDS))
    text = rng.choice(WORDS)
    while rng.random() < 0.6 or text in HELD_OUT_WORDS:
        text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, CELLS)))
    return _draw_text(rng, "word", text)


def draw_number(rng: random.Random) -> Picture:
    """One printed number of one to four digits."""
    digits = rng.randint(1, CELLS)
    number = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
    return _draw_text(rng, "number", str(number))


def draw_icons(rng: random.Random) -> Picture:
    """One to four icons of different names."""
    image, draw, side = _canvas(rng)
    n = rng.choice((1, 1, 2, 2, 3, 4))
    across, low, high = rng.choice(((2, 0.1, 0.2), (CELLS, 0.085, 0.115)))
    things = []
    cells, names = rng.sample(range(across * across), n), rng.sample(list(ICONS), n)
    for cell, name in zip(cells, names, strict=True):
        x, y, r = _cell_spot(rng, cell, across, rng.uniform(low, high))
        thing = Thing(name, rng.choice(list(COLOURS)), x, y, r)
        draw_glyph(draw, thing, side, _tint(rng, thing.colour), "default")
        things.append(thing)
    return Picture("icons", image, things)


def draw_mix(rng: random.Random) -> Picture:
    """A picture full of shapes, icons, letters and digits: nothing but food for the eyes."""
    image, draw, side = _canvas(rng)
    names = [SHAPES, LETTERS, DIGITS, *([list(ICONS)] if icon_font() else [])]
    things = []
    for cell in range(CELLS * CELLS):
        if rng.random() < 0.3:
            continue
        name = rng.choice(rng.choice(names))
        high = 0.118 if name in SHAPES else 0.105 if name in ICONS else 0.094
        x, y, r = _cell_spot(rng, cell, CELLS, rng.uniform(0.065, high))
        thing = Thing(name, rng.choice(list(COLOURS)), x, y, r)
        if name in SHAPES:
            draw_shape(draw, thing, side, _tint(rng, thing.colour))
        else:
            face = rng.choice(_font_names())
            draw_glyph(draw, thing, side, _tint(rng, thing.colour), face)
        things.append(thing)
    return Picture("mix", image, things)


BAR_UNIT = 0.11
"""Height of one unit of a chart; there is a thin line at each."""


def draw_bars(rng: random.Random) -> Picture:
    """A chart of two to four bars of values 1 to 8 over thin lines, one a unit."""
    image, draw, side = _canvas(rng)
    n = rng.randint(2, CELLS)
    first, foot = rng.randint(0, CELLS - n), 0.96
    for unit in range(1, 9):
        height = (foot - unit * BAR_UNIT) * side
        draw.line((0, height, side, height), fill=(205, 205, 205))
    colours, values = rng.sample(list(COLOURS), n), rng.sample(range(1, 9), n)
    half = rng.uniform(0.06, 0.105)
    bars = []
    for i, (colour, value) in enumerate(zip(colours, values, strict=True)):
        x = (first + i + 0.5) / CELLS
        top = foot - value * BAR_UNIT
        box = ((x - half) * side, top * side, (x + half) * side, foot * side)
        draw.rectangle(box, fill=_tint(rng, colour))
        bars.append(Bar(colour, value, x))
    draw.line((0, foot * side, side, foot * side), fill=(60, 60, 60), width=max(1, side // 128))
    return Picture("bars", image, bars=bars)


def draw_noise(rng: random.Random) -> Picture:
    """Something that is not of this world: coloured noise or a smooth blend."""
    if rng.random() < 0.5:
        small = Image.frombytes("RGB", (16, 16), rng.randbytes(768))
        image = small.resize((128, 128), Image.Resampling(rng.choice((0, 2, 3))))
    else:
        small = Image.frombytes("RGB", (3, 3), rng.randbytes(27))
        image = small.resize((128, 128), Image.Resampling.BICUBIC)
    return Picture("noise", image)
