"""The encoded bytes behind a reference to an image. Light: no Pillow, no numpy."""

from __future__ import annotations

import binascii
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

from visq.errors import (
    ImageError,
    ImageFetchFailed,
    ImageNotFound,
    ImageTooLarge,
    ImageUndecodable,
    InvalidRequest,
)
from visq.objects import FetchedObject, NotModified, ObjectStore, open_store, parse_uri
from visq.objects.web_ref import is_web, parse_url, public_name
from visq.objects.web_rules import WebRules
from visq.settings import Settings

if TYPE_CHECKING:
    from visq.objects.web import WebReader

_SCHEME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")


@dataclass(frozen=True, slots=True)
class ReadingRules:
    """What may be read."""

    max_bytes: int
    """Encoded."""
    max_pixels: int
    allow_private: bool = False
    """HTTP may lead to addresses that are not public."""
    allowed_domains: frozenset[str] | None = None
    """Hosts that HTTP may lead to; ``None``: all."""

    @classmethod
    def from_settings(
        cls,
        *,
        allow_private: bool = False,
        allowed_domains: Collection[str] | None = None,
        max_bytes: int | None = None,
        max_pixels: int | None = None,
    ) -> ReadingRules:
        """With the limits of ``VISQ_MAX_IMAGE_BYTES`` and ``_PIXELS`` where none are given."""
        settings = Settings()
        return cls(
            max_bytes=settings.max_image_bytes if max_bytes is None else max_bytes,
            max_pixels=settings.max_image_pixels if max_pixels is None else max_pixels,
            allow_private=allow_private,
            allowed_domains=(
                frozenset(domain.lower() for domain in allowed_domains) if allowed_domains else None
            ),
        )


def name_of(source: str | os.PathLike[str]) -> str:
    """What messages call an image: no megabytes, no password and no signature of a URL."""
    text = os.fspath(source)
    if text[:5].lower() == "data:":
        return "data URL"
    return public_name(text)


def read_bytes(source: str | os.PathLike[str], rules: ReadingRules) -> bytes:
    """Read an encoded image.

    :raises ImageError: one of its kinds, naming the image.
    :raises InvalidRequest: no form of a reference that is read here.
    """
    text = os.fspath(source)
    scheme = text.partition(":")[0].lower()
    if is_web(text):
        reader = _web_reader(rules.allow_private, rules.allowed_domains)
        return _bytes(reader.get(parse_url(text), max_bytes=rules.max_bytes), name_of(text))
    if scheme == "data":
        return _of_data_url(text, rules.max_bytes)
    if scheme == "s3":
        return _of_store(text, rules.max_bytes)
    if scheme == "file":
        url = urlsplit(text)
        return _of_file(Path(url2pathname(url.netloc + url.path)), rules.max_bytes)
    path = Path(text)
    if _SCHEME.match(text) and not path.exists():
        raise InvalidRequest(
            f"an image is a path, or an http, https, file, data or s3 URL, not {name_of(text)!r}"
        )
    return _of_file(path, rules.max_bytes)


def too_large(name: str, max_bytes: int) -> ImageTooLarge:
    return ImageTooLarge(f"image {name} has more than {max_bytes} bytes")


def _of_file(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():  # a named pipe would be waited for
            raise ImageNotFound(f"image {path} is not a file on this machine")
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ImageError(f"image {path} cannot be read ({error.strerror})") from error
    if len(data) > max_bytes:
        raise too_large(str(path), max_bytes)
    return data


def _of_data_url(url: str, max_bytes: int) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not text or not head.lower().endswith(";base64"):
        raise InvalidRequest("a `data:` URL of an image begins like `data:image/png;base64,`")
    if len(text) > (max_bytes + 2) // 3 * 4:
        raise too_large("data URL", max_bytes)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise ImageUndecodable(f"the base64 of the `data:` URL is broken: {error}") from None


def _of_store(uri: str, max_bytes: int) -> bytes:
    ref = parse_uri(uri)
    return _bytes(_store(Settings()).get(ref, max_bytes=max_bytes), ref.uri)


def _bytes(answer: FetchedObject | NotModified, name: str) -> bytes:
    if not isinstance(answer, FetchedObject):
        raise ImageFetchFailed(f"image {name} could not be fetched (an answer without bytes)")
    return answer.data


@lru_cache(maxsize=4)
def _store(settings: Settings) -> ObjectStore:
    """A client of S3 takes 0.1 s to make: one for all reads with the same settings."""
    return open_store(settings)


@lru_cache(maxsize=4)
def _web_reader(allow_private: bool, allowed_domains: frozenset[str] | None) -> WebReader:
    """Its certificates take a moment to load."""
    from visq.objects.web import WebReader  # only who fetches needs it

    return WebReader(
        WebRules(
            plain_http=True,
            private=allow_private,
            domains=allowed_domains,
            advice="load it with `load_image(url, allow_private=True)`",
        )
    )
