"""API keys: whose key a request brings."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping


class Keys:
    """The keys of ``VISQ_API_KEYS``, as hashes: nothing here can print a secret."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        self._digests = [(_digest(secret.encode()), tenant) for tenant, secret in secrets.items()]

    def tenant_of(self, key: bytes) -> str | None:
        """The name of the key's tenant. Every key is compared, each in constant time, so that
        the time of an answer tells nothing about any of them."""
        given = _digest(key)
        found = None
        for digest, tenant in self._digests:
            if hmac.compare_digest(given, digest):
                found = tenant
        return found


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
