"""Which servers may be asked for images.

A URL comes from somebody else, and the process that follows it stands inside a network that this
somebody may not enter. So all addresses of a host must be public, unless the operator has listed
it (``VISQ_IMAGE_URL_HOSTS``).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from visq.errors import ImageForbidden
from visq.objects.web_ref import WebRef, is_address
from visq.settings import Settings

_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
"""All of IPv6 that is given out."""
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class WebRules:
    """Which servers may be asked. The methods raise `ImageForbidden`, naming the image."""

    everyone: bool = True
    """Others than the listed ones."""
    listed: frozenset[tuple[str, int]] = frozenset()
    """(host, port) that may be asked whatever their address, and also by ``http://``."""
    plain_http: bool = False
    """Others may be asked by ``http://``, too."""
    private: bool = False
    """Others may have addresses that are not public."""
    domains: frozenset[str] | None = None
    """Hosts that all must be one of; ``None``: any."""
    advice: str = "list its host in VISQ_IMAGE_URL_HOSTS"
    """How to allow an address that is not public."""

    @classmethod
    def from_settings(cls, settings: Settings) -> WebRules:
        """Those for images of jobs."""
        return cls(everyone=settings.image_urls == "public", listed=settings.image_hosts)

    def check(self, ref: WebRef, *, name: str | None = None) -> None:
        """What can be told without a look-up of the host's name.

        :param name: of the image, if a redirect led from it to `ref`.
        """
        if self.domains is not None and ref.host not in self.domains:
            why = f"{ref.host}, which is not one of `allowed_media_domains`"
        elif self._lists(ref):
            return
        elif not self.everyone:
            why = f"{ref.netloc}, from where this server reads no images"
        elif ref.scheme != "https" and not self.plain_http:
            why = f"{ref.netloc} by `http://`; give an `https://` URL"
        else:
            if is_address(ref.host):
                self.check_addresses(ref, [ref.host], name=name)
            return
        raise ImageForbidden(f"image {name or ref} leads to {why}")

    def check_addresses(
        self, ref: WebRef, addresses: Collection[str], *, name: str | None = None
    ) -> None:
        """`addresses`: all of the host's, one of which will be asked."""
        if not (self.private or self._lists(ref) or all(map(is_public, addresses))):
            raise ImageForbidden(
                f"image {name or ref} leads to an address that is not public; if that is meant, "
                f"{self.advice}"
            )

    def _lists(self, ref: WebRef) -> bool:
        return (ref.host, ref.port) in self.listed


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; so must be an IPv4 address inside it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    inside = ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64:
        inside = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
    if inside is not None:
        return is_public(str(inside))
    return ip in _UNICAST and ip.is_global
