"""Images as pixels in this process, by the very rules of the worker's media processes."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from visq import rooms
from visq.errors import ImageError, ImageTooLarge, InvalidRequest
from visq.vl.reading import ReadingRules, name_of, read_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

ImageSource = str | os.PathLike[str] | Image.Image

_PILLOW: Final = threading.Lock()
"""The rules set Pillow's limit, which is one for the whole program; here it is put back."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as the model gets it."""

    array: NDArray[np.uint8]
    """RGB, (height, width, 3)."""
    sha256: str
    """Of the encoded bytes; of a PIL image, of its size and pixels."""


def load_picture(source: ImageSource, rules: ReadingRules) -> Picture:
    """Read and decode an image.

    :raises ImageError: one of its kinds, naming the image.
    :raises InvalidRequest: no form of an image.
    """
    if isinstance(source, Image.Image):
        return _of_pil(source, rules)
    if not isinstance(source, str | os.PathLike):
        raise InvalidRequest(
            f"an image is a path, a URL or a PIL image, not {type(source).__name__}"
        )
    data = read_bytes(source, rules)
    return Picture(_decoded(data, name_of(source), rules), hashlib.sha256(data).hexdigest())


def _decoded(data: bytes, name: str, rules: ReadingRules) -> NDArray[np.uint8]:
    rooms.mount(guest=True)
    from worker.media.decode import decode

    with _PILLOW:
        limit = Image.MAX_IMAGE_PIXELS
        try:
            return decode(data, rules.max_pixels)
        except ImageError as error:  # a sentence without its beginning
            raise type(error)(f"image {name} {error.message}") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _of_pil(image: Image.Image, rules: ReadingRules) -> Picture:
    rooms.mount(guest=True)
    from worker.media.decode import as_rgb

    if image.width * image.height > rules.max_pixels:
        raise ImageTooLarge(f"a PIL image has more than {rules.max_pixels} pixels")
    if not image.width or not image.height:
        raise InvalidRequest("a PIL image has no pixels")
    try:
        array = np.ascontiguousarray(as_rgb(image))
    except ImageError as error:
        raise type(error)(f"a PIL image {error.message}") from None
    # Another beginning than any encoded image has, so that the two kinds of hash never meet.
    digest = hashlib.sha256(f"pixels {array.shape[0]}x{array.shape[1]}:".encode())
    digest.update(array.data)
    return Picture(array, digest.hexdigest())
