"""Images over HTTP, with the caution that a URL from somewhere else needs.

Each hop of a redirect is checked anew. The host's name is looked up once, all its addresses must be
public, and the connection goes to the very address that was checked: a name that answers
differently the second time (DNS rebinding) leads nowhere. Hence no proxy: it would look up the name
itself. The bytes are counted while they come.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import Final
from urllib.parse import urljoin

import httpx2

from visq import __version__
from visq.errors import (
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    InvalidRequest,
    VisqError,
)
from visq.vl.reading import ReadingRules, name_of, too_large

SILENCE_SECONDS: Final = 10.0
"""Longest wait for a connection, or for the next bytes."""
TOTAL_SECONDS: Final = 60.0
"""Longest fetch of one image, redirects and the second attempt included."""
MAX_REDIRECTS: Final = 3
ATTEMPTS: Final = 2

_CHUNK: Final = 64 * 1024
_HEADERS: Final = {"User-Agent": f"visq-python/{__version__}", "Accept-Encoding": "identity"}


def get(url: str, rules: ReadingRules) -> bytes:
    """Fetch an image.

    :raises ImageForbidden: the URL or a redirect leads where it may not.
    :raises ImageNotFound: the server answers 404 or 410.
    :raises ImageTooLarge: it has more bytes than `rules` allow; no more are read.
    :raises ImageFetchFailed: no answer, or another one.
    """
    deadline = time.monotonic() + TOTAL_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _follow(url, rules, deadline)
        except ImageFetchFailed:
            if attempt == ATTEMPTS or time.monotonic() >= deadline:
                raise
    raise AssertionError("unreachable")


def _follow(url: str, rules: ReadingRules, deadline: float) -> bytes:
    name = name_of(url)
    for _ in range(MAX_REDIRECTS + 1):
        found = _hop(url, name, rules, deadline)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise _refused(name, f"is redirected more than {MAX_REDIRECTS} times")


def _hop(url: str, name: str, rules: ReadingRules, deadline: float) -> bytes | str:
    """The image, or where it is said to be instead."""
    try:
        asked = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InvalidRequest(f"image {name} has no valid URL: {error}") from None
    address = _checked_address(asked, name, rules)
    headers = {**_HEADERS, "Host": asked.netloc.decode("ascii")}
    try:
        with (
            httpx2.Client(timeout=SILENCE_SECONDS, trust_env=False) as client,
            client.stream(
                "GET",
                asked.copy_with(host=address, username=None, password=None),
                headers=headers,
                auth=(asked.username, asked.password) if asked.userinfo else None,
                extensions={"sni_hostname": asked.host},
            ) as response,
        ):
            if response.is_redirect:
                return str(response.headers.get("Location", ""))
            if response.status_code != 200:
                raise _failure(name, response.status_code)
            return _body(response, name, rules.max_bytes, deadline)
    except httpx2.TransportError as error:
        raise ImageFetchFailed(
            f"image {name} could not be fetched ({type(error).__name__})"
        ) from error


def _body(response: httpx2.Response, name: str, max_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    for chunk in response.iter_raw(_CHUNK):  # not unpacked: that could be any size
        data += chunk
        if len(data) > max_bytes:
            raise too_large(name, max_bytes)
        if time.monotonic() > deadline:
            raise ImageFetchFailed(f"image {name} took more than {TOTAL_SECONDS:g} s")
    return bytes(data)


def _checked_address(url: httpx2.URL, name: str, rules: ReadingRules) -> str:
    """An address of the URL's host, all of which may be asked."""
    if url.scheme not in ("http", "https") or not url.host:
        raise _refused(name, "leads to something else than http and https")
    if rules.allowed_domains is not None and url.host.lower() not in rules.allowed_domains:
        why = f"leads to {url.host}, which is not one of `allowed_media_domains`"
        raise _refused(name, why)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        found = socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ImageFetchFailed(
            f"image {name} could not be fetched (its host is not found)"
        ) from error
    addresses = [str(entry[4][0]) for entry in found]
    if not rules.allow_private and not all(map(_is_public, addresses)):
        raise _refused(
            name,
            "leads to an address that is not public; if that is meant, load it with "
            "`load_image(url, allow_private=True)`",
        )
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_global and not (mapped or ip).is_multicast


def _refused(name: str, why: str) -> ImageForbidden:
    return ImageForbidden(f"image {name} {why}")


def _failure(name: str, status: int) -> VisqError:
    if status in (404, 410):
        return ImageNotFound(f"image {name} is not found")
    if status in (401, 403):
        return ImageForbidden(f"image {name} is refused by its server")
    return ImageFetchFailed(f"image {name} could not be fetched (HTTP status {status})")
