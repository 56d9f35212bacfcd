"""Draws the small model's world: a picture, and the facts that are true of it.

Needs only Pillow.  Everything is a pure function of a ``random.Random``, so the same seed gives the
same picture.  What may be asked about a picture is in ``questions.py``; ``sample`` joins the two:

    sample(seed)  ->  Sample(images, talks)       e.g. a 256x256 picture of five shapes, and
                                                  ten conversations about it, each with its skill

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

from .vocabulary import BACKGROUNDS, COLOURS, HELD_OUT_WORDS, ICONS, PLACES, SHAPES, WORDS

Colour = tuple[int, int, int]
CANVAS_SIZES = (128, 160, 192, 256, 320)
"""Side lengths to draw at; the model's processor brings each to its own size."""

DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
"""Where Debian keeps DejaVu; used when it is there."""


@dataclass(frozen=True)
class Thing:
    """One shape, icon or piece of text; places and sizes are fractions of the picture's side."""

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
        return all(abs(v - edge) > 0.04 for v in (self.x, self.y) for edge in edges)


@dataclass(frozen=True)
class Bar:
    """One bar of a chart; its value is a whole number from 1 to 10."""

    colour: str
    value: int


@dataclass
class Picture:
    """An image with the facts that questions are made from."""

    kind: str
    image: Image.Image
    things: list[Thing] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    known_word: bool = True


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


RADII = {1: (0.10, 0.36), 2: (0.09, 0.22), 3: (0.08, 0.19), 4: (0.075, 0.16), 5: (0.07, 0.15)}


def _places(rng: random.Random, n: int) -> list[tuple[float, float, float]]:
    """``n`` middles and radii that do not touch, found by trying."""
    low, high = RADII.get(n, (0.065, 0.125))
    while True:
        found: list[tuple[float, float, float]] = []
        for _ in range(40 * n):
            r = rng.uniform(low, high)
            x, y = rng.uniform(r + 0.01, 0.99 - r), rng.uniform(r + 0.01, 0.99 - r)
            if all(math.hypot(x - a, y - b) > r + c + 0.015 for a, b, c in found):
                found.append((x, y, r))
                if len(found) == n:
                    return found


def draw_shapes(rng: random.Random, most: int = 9) -> Picture:
    """One to nine shapes; a third of the pictures keep to few names and colours."""
    n = rng.randint(1, most)
    names, colours = list(SHAPES), list(COLOURS)
    if n > 2 and rng.random() < 0.5:
        names = rng.sample(names, 2)
    if n > 2 and rng.random() < 0.35:
        colours = rng.sample(colours, 2)
    image, draw, side = _canvas(rng)
    things = []
    for x, y, r in _places(rng, n):
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
    """Pillow's own font twice, and four faces of DejaVu where the machine has them."""
    faces = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Bold")
    here = tuple(str(DEJAVU / f"{face}.ttf") for face in faces if (DEJAVU / f"{face}.ttf").exists())
    return ("default", "default", *here)


def _write(
    draw: ImageDraw.ImageDraw, rng: random.Random, side: int, thing: Thing, width: float
) -> Thing:
    """Write ``thing.name`` about ``width`` wide, in any case; returns where it came to stand."""
    text = rng.choice((thing.name, thing.name.upper(), thing.name.capitalize()))
    face = rng.choice(_font_names())
    probe = _font(face, 40).getlength(text)
    size = int(min(40 * width * side / probe, 0.42 * side))
    font = _font(face, max(size - size % 4, 8))
    left, top, right, bottom = font.getbbox(text)
    half_w, half_h = (right - left) / 2 / side, (bottom - top) / 2 / side
    x = min(max(thing.x, half_w + 0.03), 0.97 - half_w)
    y = min(max(thing.y, half_h + 0.03), 0.97 - half_h)
    origin = (x * side - (left + right) / 2, y * side - (top + bottom) / 2)
    draw.text(origin, text, font=font, fill=_tint(rng, thing.colour))
    return Thing(thing.name, thing.colour, x, y, half_h)


def _random_word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 5)))


def draw_word(rng: random.Random, held_out: bool = False) -> Picture:
    """One printed word: a known one, or (a fifth of them) letters that make no word."""
    image, draw, side = _canvas(rng)
    known = held_out or rng.random() < 0.8
    word = rng.choice(WORDS) if known else _random_word(rng)
    if held_out and rng.random() < 0.2:
        word, known = rng.choice(HELD_OUT_WORDS), False
    thing = Thing(word, rng.choice(list(COLOURS)), 0.5, rng.uniform(0.2, 0.8), 0.1)
    width = min(0.9, rng.uniform(0.14, 0.24) * max(len(word), 2))
    return Picture("word", image, [_write(draw, rng, side, thing, width)], known_word=known)


def draw_number(rng: random.Random) -> Picture:
    """One printed number of one to four digits."""
    image, draw, side = _canvas(rng)
    digits = rng.choice((1, 1, 2, 2, 3, 3, 4))
    number = str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    x, y = rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.75)
    thing = Thing(number, rng.choice(list(COLOURS)), x, y, 0.1)
    width = rng.uniform(0.16, 0.24) * digits
    return Picture("number", image, [_write(draw, rng, side, thing, width)])


@lru_cache(maxsize=1)
def icon_font() -> str | None:
    """The file of Font Awesome Free Solid, if its package is installed."""
    package = importlib.util.find_spec("fontawesomefree")
    if package is None or not package.submodule_search_locations:
        return None
    root = Path(package.submodule_search_locations[0])
    return str(next(root.rglob("fa-solid-900.ttf")))


def draw_icons(rng: random.Random, most: int = 3) -> Picture:
    """One to three icons."""
    font_file = icon_font()
    if font_file is None:
        raise RuntimeError("icon pictures need the package fontawesomefree")
    image, draw, side = _canvas(rng)
    n = rng.choice((1, 1, 2, 2, 3)[: 2 * most])
    names = rng.sample(list(ICONS), n)
    colours = rng.sample(list(COLOURS), n)
    things = []
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        r = rng.uniform(0.16, 0.34) if n == 1 else rng.uniform(0.13, 0.2) if n == 2 else 0.14
        x = (i + 0.5) / n + rng.uniform(-0.04, 0.04) if n > 1 else rng.uniform(r + 0.05, 0.95 - r)
        y = rng.uniform(r + 0.05, 0.95 - r)
        font = _font(font_file, int(1.6 * r * side) // 4 * 4)
        glyph = chr(ICONS[name])
        left, top, right, bottom = font.getbbox(glyph)
        origin = (x * side - (left + right) / 2, y * side - (top + bottom) / 2)
        draw.text(origin, glyph, font=font, fill=_tint(rng, colour))
        things.append(Thing(name, colour, x, y, r))
    return Picture("icons", image, things)


def draw_bars(rng: random.Random) -> Picture:
    """A chart of two to five bars of values 1 to 10, with an axis marked 0, 5 and 10."""
    image, draw, side = _canvas(rng)
    n = rng.randint(2, 5)
    bars = [
        Bar(colour, value)
        for colour, value in zip(
            rng.sample(list(COLOURS), n), rng.sample(range(1, 11), n), strict=True
        )
    ]
    left, bottom, top = 0.16 * side, 0.92 * side, 0.08 * side
    unit = (bottom - top) / 10
    grid, ink = (205, 205, 205), (60, 60, 60)
    for tick in range(0, 11, 5 if rng.random() < 0.5 else 1):
        height = bottom - tick * unit
        draw.line((left, height, 0.97 * side, height), fill=grid)
    for tick in (0, 5, 10):
        label = _font("default", max(9, side // 12))
        draw.text((left - 3, bottom - tick * unit), str(tick), font=label, fill=ink, anchor="rm")
    draw.line((left, top, left, bottom), fill=ink, width=max(1, side // 128))
    draw.line((left, bottom, 0.97 * side, bottom), fill=ink, width=max(1, side // 128))
    step = (0.97 * side - left) / n
    fat = step * rng.uniform(0.5, 0.8)
    for i, bar in enumerate(bars):
        x = left + (i + 0.5) * step
        box = (x - fat / 2, bottom - bar.value * unit, x + fat / 2, bottom)
        draw.rectangle(box, fill=_tint(rng, bar.colour))
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
