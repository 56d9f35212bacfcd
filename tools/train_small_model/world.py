"""The small model's world: what can be in a picture, and how each thing is drawn.

Needs only Pillow.  Everything is a pure function of a ``random.Random``, so the same seed gives the
same picture.  The model sees a picture of any size as a square of 6 x 6 tokens; no token's part of
the picture holds the middle of more than one thing, so that nothing is lost where eyes and tongue
meet.  Whole pictures are drawn in ``scenes.py``; what may be asked about them is in
``questions.py``.

Fonts: Pillow's own; DejaVu Sans and Font Awesome Free Solid from the folder that the environment
variable ``SMALL_MODEL_FONTS`` names, or else DejaVu where Debian keeps it and Font Awesome from the
pip package ``fontawesomefree``.  Without the latter, icon pictures cannot be drawn.
"""

import importlib.util
import math
import os
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .vocabulary import BACKGROUNDS, COLOURS, ICONS, PLACES

Colour = tuple[int, int, int]

CELLS = 6
"""Image tokens in a row of the picture, and in a column."""

USUAL_SIDE = 192
"""What the model's processor brings every picture to."""

OTHER_SIZES = (
    *((side, side) for side in (128, 160, 224, 256, 320)),
    *((192, 144), (144, 192), (256, 192), (192, 256), (240, 160), (160, 240), (200, 180)),
)

DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
"""Where Debian keeps DejaVu."""


@dataclass(frozen=True)
class Thing:
    """One shape, icon, letter or digit; places are fractions of width and height, ``r`` is one of
    the shorter side.
    """

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


def tint(rng: random.Random, name: str) -> Colour:
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


@dataclass
class Canvas:
    """An image that is being drawn."""

    image: Image.Image
    pen: ImageDraw.ImageDraw

    def spot(self, thing: Thing) -> tuple[float, float, float]:
        """Middle and radius in pixels."""
        width, height = self.image.size
        return thing.x * width, thing.y * height, thing.r * min(width, height)


def canvas(rng: random.Random) -> Canvas:
    """An empty picture; half are of the size that the model sees, the others of any."""
    size = (USUAL_SIDE, USUAL_SIDE) if rng.random() < 0.6 else rng.choice(OTHER_SIZES)
    if rng.random() < 0.7:
        ground = rng.choice(BACKGROUNDS)
    else:
        ground = (rng.randint(222, 255), rng.randint(222, 255), rng.randint(222, 255))
    image = Image.new("RGB", size, ground)
    return Canvas(image, ImageDraw.Draw(image))


def draw_shape(on: Canvas, thing: Thing, fill: Colour) -> None:
    """Draw one shape."""
    x, y, r = on.spot(thing)
    if thing.name == "circle":
        on.pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.name == "ring":
        on.pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, round(r * 0.3)))
    else:
        on.pen.polygon(_polygon(thing.name, x, y, r), fill=fill)


@lru_cache(maxsize=1024)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "default":
        found = ImageFont.load_default(size)
        assert isinstance(found, ImageFont.FreeTypeFont)
        return found
    return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)


def _font_folder() -> Path | None:
    named = os.environ.get("SMALL_MODEL_FONTS")
    return Path(named) if named else None


@lru_cache(maxsize=1)
def faces() -> tuple[str, ...]:
    """Pillow's own font, and two faces of DejaVu where there are any."""
    folder = _font_folder() or DEJAVU
    files = (folder / f"{face}.ttf" for face in ("DejaVuSans", "DejaVuSans-Bold"))
    return ("default", *(str(file) for file in files if file.exists()))


@lru_cache(maxsize=1)
def icon_font() -> str | None:
    """The file of Font Awesome Free Solid, if it is here."""
    folder = _font_folder()
    if folder is not None:
        file = folder / "fa-solid-900.ttf"
        return str(file) if file.exists() else None
    package = importlib.util.find_spec("fontawesomefree")
    if package is None or not package.submodule_search_locations:
        return None
    root = Path(package.submodule_search_locations[0])
    return str(next(root.rglob("fa-solid-900.ttf")))


@lru_cache(maxsize=20_000)
def _glyph(face: str, size: int, text: str) -> tuple[ImageFont.FreeTypeFont, float, float]:
    """Font, and from the origin to the middle of what is inked."""
    font = _font(face, size)
    left, top, right, bottom = font.getbbox(text)
    return font, (left + right) / 2, (top + bottom) / 2


def draw_glyph(on: Canvas, thing: Thing, fill: Colour, face: str) -> None:
    """Draw an icon, or a letter (as a capital) or digit in the given face, around its middle."""
    x, y, r = on.spot(thing)
    if thing.name in ICONS:
        icons = icon_font()
        if icons is None:
            raise RuntimeError("icon pictures need the package fontawesomefree")
        font, dx, dy = _glyph(icons, 2 * max(4, int(0.85 * r)), chr(ICONS[thing.name]))
        text = chr(ICONS[thing.name])
    else:
        text = thing.name.upper()
        font, dx, dy = _glyph(face, max(8, int(2.4 * r)), text)
    on.pen.text((x - dx, y - dy), text, font=font, fill=fill)
