"""Images over HTTP, with the caution that a URL from somewhere else needs.

Each hop of a redirect is checked anew. The host's name is looked up once, its addresses are
checked, and the connection goes to one of those very addresses: a name that answers differently the
second time (DNS rebinding) leads nowhere. Hence no proxy: it would look up the name itself. The
bytes are counted while they come, and one limit of time holds over all of it.
"""

from __future__ import annotations

import base64
import random
import re
import socket
import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

import httpcore2
import httpx2

from visq import __version__
from visq.errors import (
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
)
from visq.objects.store import FetchedObject, NotModified
from visq.objects.web_connection import Pinned
from visq.objects.web_ref import WebRef
from visq.objects.web_rules import WebRules

_CONNECT_SECONDS: Final = 5.0
_MAX_REDIRECTS: Final = 3
_TRIES: Final = 2
_BACKOFF_SECONDS: Final = 0.5
"""Longest wait before the second try."""
_MAX_ADDRESSES: Final = 4
"""Of one host, that are tried."""

_HEADERS: Final = (
    ("User-Agent", f"visq/{__version__}"),
    # Named, since many servers answer `image/*` with AVIF.
    ("Accept", "image/png, image/jpeg, image/webp, image/gif, image/bmp, */*;q=0.1"),
    ("Accept-Encoding", "identity"),  # nothing is unpacked: that could be any size
    ("Connection", "close"),
)
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that another try may not meet."""
_STRONG_ETAG: Final = re.compile(r'"[\x21\x23-\x7e]{0,200}"')
"""A weak one does not say that the bytes are the same."""

_Failure = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)


class WebReader:
    """Reads images of the web. Thread-safe; each read has a connection of its own."""

    def __init__(
        self, rules: WebRules, *, silence_seconds: float = 10.0, total_seconds: float = 60.0
    ) -> None:
        """
        :param silence_seconds: longest wait for the next bytes.
        :param total_seconds: longest read of one image, redirects and the second try included.
        """
        self._rules = rules
        self._seconds = total_seconds
        self._timeouts = {
            "connect": min(_CONNECT_SECONDS, silence_seconds),
            "read": silence_seconds,
            "write": silence_seconds,
        }
        self._tls = httpx2.create_ssl_context()

    def get(
        self, ref: WebRef, *, max_bytes: int, if_none_match: str | None = None
    ) -> FetchedObject | NotModified:
        """Read one image. Every error names it by `public_name`.

        :raises ImageForbidden: it, or a redirect, leads where it may not, or its server refuses it.
        :raises ImageNotFound: the server answers 404 or 410.
        :raises ImageTooLarge: it has more than `max_bytes`; no more than that is read.
        :raises ImageFetchFailed: no answer, not to the end, or another one.
        """
        errand = _Errand(ref, max_bytes, if_none_match, time.monotonic() + self._seconds)
        try:
            try:
                return self._followed(errand)
            except _PassingError:
                time.sleep(min(random.random() * _BACKOFF_SECONDS, errand.seconds_left))
                return self._followed(errand)
        except _PassingError as error:
            limit = "" if errand.seconds_left else f" in {self._seconds:g} s"
            raise ImageFetchFailed(f"image {ref} could not be fetched{limit} ({error})") from error

    def _followed(self, errand: _Errand) -> FetchedObject | NotModified:
        asked = errand.ref
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                found = self._asked(asked, errand)
            except _Failure as error:
                raise _PassingError(type(error).__name__) from error
            if not isinstance(found, _Elsewhere):
                return found
            try:
                asked = asked.redirected(found.location)
            except ValueError as error:
                raise errand.forbidden(f"is redirected to a URL that {error}") from None
        raise errand.forbidden(f"is redirected more than {_MAX_REDIRECTS} times")

    def _asked(self, asked: WebRef, errand: _Errand) -> FetchedObject | NotModified | _Elsewhere:
        """What the server of `asked` answers: that of the errand's image, or of a redirect."""
        addresses = self._addresses(asked, errand)
        headers = [*_HEADERS, ("Host", asked.netloc)]
        if asked.userinfo:
            headers.append(("Authorization", _basic(asked.userinfo)))
        # An ETag is one of the URL that was asked for: that of another one says nothing about it.
        is_first = asked is errand.ref
        known = errand.etag if is_first else None
        if known is not None:
            headers.append(("If-None-Match", known))
        scheme, host = asked.scheme.encode(), asked.host.encode()
        with (
            httpcore2.HTTPConnection(
                httpcore2.Origin(scheme, host, asked.port),
                ssl_context=self._tls,
                network_backend=Pinned(addresses, errand.deadline),
            ) as connection,
            connection.stream(
                "GET",
                httpcore2.URL(scheme=scheme, host=host, port=asked.port, target=asked.target),
                headers=headers,
                extensions={"timeout": self._timeouts},
            ) as answer,
        ):
            if answer.status in _REDIRECTS:
                return _Elsewhere(_header(answer, b"location"))
            if answer.status == 304 and known is not None:
                return NotModified()
            if answer.status != 200:
                raise _failure(errand.ref, answer.status)
            etag = _header(answer, b"etag")
            data = _body(answer, errand)
            is_strong = is_first and _STRONG_ETAG.fullmatch(etag) is not None
            return FetchedObject(data, etag if is_strong else None)

    def _addresses(self, asked: WebRef, errand: _Errand) -> list[str]:
        """Addresses of the host, all of which may be asked."""
        self._rules.check(asked, name=str(errand.ref))
        try:
            found = socket.getaddrinfo(asked.host, asked.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _PassingError("its host is not found") from error
        addresses = [str(entry[4][0]) for entry in found]
        self._rules.check_addresses(asked, addresses, name=str(errand.ref))
        return addresses[:_MAX_ADDRESSES]


@dataclass(frozen=True, slots=True)
class _Errand:
    """One call of `get`."""

    ref: WebRef
    max_bytes: int
    etag: str | None
    deadline: float

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def forbidden(self, why: str) -> ImageForbidden:
        return ImageForbidden(f"image {self.ref} {why}")

    def too_large(self) -> ImageTooLarge:
        return ImageTooLarge(f"image {self.ref} has more than {self.max_bytes} bytes")


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """A redirect."""

    location: str


class _PassingError(Exception):
    """What another try may not meet."""


def _body(answer: httpcore2.Response, errand: _Errand) -> bytes:
    length = _header(answer, b"content-length")
    if length.isdecimal() and int(length) > errand.max_bytes:
        raise errand.too_large()
    data = bytearray()
    for chunk in answer.iter_stream():
        data += chunk
        if len(data) > errand.max_bytes:
            raise errand.too_large()
    return bytes(data)


def _failure(ref: WebRef, status: int) -> Exception:
    if status in _PASSING:
        return _PassingError(f"HTTP status {status}")
    if status in (404, 410):
        return ImageNotFound(f"image {ref} is not found")
    if status in (401, 403):
        return ImageForbidden(f"image {ref} is refused by its server")
    return ImageFetchFailed(f"image {ref} could not be fetched (HTTP status {status})")


def _header(answer: httpcore2.Response, name: bytes) -> str:
    """Its first value; empty: there is none."""
    found = (value for key, value in answer.headers if key.lower() == name)
    return next(found, b"").decode("utf-8", "replace")


def _basic(userinfo: bytes) -> str:
    return f"Basic {base64.b64encode(unquote_to_bytes(userinfo)).decode()}"
