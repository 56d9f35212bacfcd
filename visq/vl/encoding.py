"""A PIL image as the bytes of a file, for uploads. Needs Pillow and nothing else."""

from __future__ import annotations

import io
from typing import Final

from PIL import Image, ImageOps

_IN_PNG: Final = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def as_png(image: Image.Image) -> bytes:
    """The image without loss, the right way up."""
    image = ImageOps.exif_transpose(image)
    if image.mode not in _IN_PNG:
        image = image.convert("RGB")
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
