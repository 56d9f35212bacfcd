"""Images for prompts, under the names of ``lmdeploy.vl``. Nothing heavy is imported before it is
used.

============ =====================================================================
`reading`    the bytes behind a path, a URL, a ``data:`` URL or an ``s3://`` name
`pictures`   bytes and PIL images as pixels, by the rules of the worker
============ =====================================================================
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from visq.vl.constants import IMAGE_TOKEN

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_TOKEN", "load_image"]


def load_image(
    image_url: str | os.PathLike[str] | Image,
    *,
    allow_private: bool = False,
    max_bytes: int | None = None,
    max_pixels: int | None = None,
) -> Image:
    """Fetch and decode an image, as a person sees it: turned as its EXIF data say, transparency on
    white.

    :param image_url: a path, ``http(s)://``, ``file://``, a ``data:`` URL, ``s3://bucket/key`` (of
        the store that ``VISQ_OBJECT_STORE`` names), or a PIL image.
    :param allow_private: HTTP may lead to addresses that are not public (localhost, a LAN).
    :param max_bytes: by default ``VISQ_MAX_IMAGE_BYTES``.
    :param max_pixels: by default ``VISQ_MAX_IMAGE_PIXELS``; looked at before anything is decoded.
    :returns: mode RGB.
    :raises ImageError: one of its kinds, naming the image: `ImageNotFound`, `ImageForbidden`,
        `ImageTooLarge`, `ImageUndecodable`, `ImageFetchFailed`.
    :raises InvalidRequest: it is none of these forms.
    """
    from PIL import Image as PilImage

    from visq.vl.pictures import load_picture
    from visq.vl.reading import ReadingRules

    rules = ReadingRules.from_settings(
        allow_private=allow_private, max_bytes=max_bytes, max_pixels=max_pixels
    )
    return PilImage.fromarray(load_picture(image_url, rules).array)
