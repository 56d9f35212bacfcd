"""The name of an image on the web: an ``https://`` URL, taken apart once.

Nothing below takes the URL apart again, so what is checked is what is asked. URLs are secrets (a
signature or a password lets whoever has it read): everything that people see (messages, logs, the
files of the cache) calls an image by `public_name`.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Final

import httpx2

from visq.errors import InvalidRequest

MAX_URL: Final = 8192
"""Characters."""
MAX_NAME: Final = 300

_SCHEME: Final = re.compile(r"https?://", re.IGNORECASE)
_HOST: Final = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class WebRef:
    """One image on the web. Two URLs that differ are two images."""

    uri: str = field(repr=False)
    """As it was given."""
    scheme: str
    """``http`` or ``https``."""
    host: str
    """A name in ASCII, or an IP address without brackets."""
    port: int
    target: bytes = field(repr=False)
    """Path and query, as the server is asked for them."""
    userinfo: bytes = field(repr=False)
    """``user:password``, or empty."""

    @property
    def netloc(self) -> str:
        """Host and port, as a ``Host`` header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def redirected(self, location: str) -> WebRef:
        """Where this server says that the image is.

        :raises ValueError: no URL that is asked; says why, as the end of a sentence.
        """
        try:
            return _parse(str(httpx2.URL(self.uri).join(location)))
        except httpx2.InvalidURL:
            raise ValueError("is not valid") from None

    def __str__(self) -> str:
        return public_name(self.uri)


def is_web(uri: str) -> bool:
    """Whether `uri` is one of the web, well formed or not."""
    return _SCHEME.match(uri) is not None


def parse_url(url: str) -> WebRef:
    """Parse an ``http(s)://`` URL.

    :raises InvalidRequest: it is no such URL. The message does not repeat it.
    """
    try:
        return _parse(url)
    except ValueError as error:
        raise InvalidRequest(f"the URL of an image {error}") from None


def public_name(uri: str) -> str:
    """What messages call an image: without the query, user and password of a URL, and not long."""
    if not is_web(uri):
        return uri
    scheme, _, rest = re.split(r"[?#]", uri, maxsplit=1)[0].partition("://")
    authority, slash, path = rest.partition("/")
    name = f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..."


def _parse(url: str) -> WebRef:
    """:raises ValueError: the end of a sentence about the URL."""
    if len(url) > MAX_URL:
        raise ValueError(f"has more than {MAX_URL} characters")
    if not is_web(url):
        raise ValueError("leads to something else than http and https")
    if any(character.isspace() for character in url):
        raise ValueError("has white space; write it as `%20`")
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, UnicodeError):
        raise ValueError("is not valid") from None
    host = parsed.raw_host.decode("ascii").lower()
    if not _HOST.fullmatch(host) and not is_address(host):
        raise ValueError("has no valid host")
    port = _PORTS[parsed.scheme] if parsed.port is None else parsed.port
    if not 0 < port < 65536:
        raise ValueError("has no valid port")
    return WebRef(url, parsed.scheme, host, port, parsed.raw_path, parsed.userinfo)


def is_address(host: str) -> bool:
    """Whether `host` is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
