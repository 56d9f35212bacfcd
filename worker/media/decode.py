"""The rules by which bytes become a picture. Runs in media processes only, on untrusted bytes.

The model sees what a person sees: EXIF orientation is applied, transparency lies on white, CMYK and
palettes become RGB, 16 bits are scaled and not cut, an animation shows its first frame.

TIFF, PSD, EPS and the like are not read: their parsers are where most of Pillow's memory faults
were. Messages are ours and stable; the library's own text can hold addresses and goes nowhere. Each
is the end of a sentence that begins with the image's name.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from visq.errors import ImageTooLarge, ImageUndecodable

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "WEBP")

OUT_OF_MEMORY: Final = "needs more memory to decode than a media process has"

_UNKNOWN: Final = f"is not a picture in a format that is read ({', '.join(FORMATS)})"
_BROKEN: Final = "is a damaged or cut-off picture"
_WHITE: Final = (255, 255, 255, 255)

# What Pillow and its codecs raise on bytes that are not what they promise.
_DAMAGE: Final = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Return the picture in `data` as RGB, uint8, (height, width, 3).

    :raises ImageTooLarge: more than `max_pixels`, or more memory than this process may use.
    :raises ImageUndecodable: not a picture, of a format that is not read, or damaged.
    """
    too_large = ImageTooLarge(f"has more than {max_pixels} pixels")
    # Pillow's own guard, for sizes that are not in the header (frames), beside ours below.
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _opened(data) as image:
                if image.width * image.height > max_pixels:
                    raise too_large
                return as_rgb(image)
    except MemoryError:
        raise ImageTooLarge(OUT_OF_MEMORY) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_large from None


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageUndecodable(_UNKNOWN) from None
    except _DAMAGE:
        raise ImageUndecodable(_BROKEN) from None


def as_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return an opened picture as RGB, uint8, (height, width, 3).

    :raises ImageUndecodable: damaged.
    """
    try:
        image.load()  # of an animation: the first frame
        image = _in_8_bits(ImageOps.exif_transpose(image))
        if image.has_transparency_data:
            image = _on_white(image)
        return np.asarray(image.convert("RGB"))
    except _DAMAGE:
        raise ImageUndecodable(_BROKEN) from None


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own `convert` cuts it off at 255.

    16-bit colour needs nothing: Pillow reads it in 8 bits.
    """
    if not image.mode.startswith("I;16"):
        return image
    samples = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
