"""Names of cached things: equal content, equal name; any other content, another name.

A block of KV cache depends on every token before it and on the content of every picture among
them, so its hash is a chain::

    root            model, dtype, adapter, salt of the tenant
    hash of block n = blake2b(hash of block n-1, its token ids, (key, offset) of its pictures)

A picture's placeholder tokens are the same for all pictures: what tells pictures apart is their
key. The hash is cryptographic, since tenants choose what is hashed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Final

DIGEST: Final = 16
"""Bytes of a hash."""


def root_key(*parts: str) -> bytes:
    """The parent of all first blocks that may share content.

    :param parts: whatever the cached content depends on beside the tokens.
    """
    digest = hashlib.blake2b(digest_size=DIGEST, person=b"visq-root")
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def image_key(salt: str, sha256: str, height: int, width: int) -> bytes:
    """Name of a picture's features; `sha256` is of its encoded bytes."""
    return root_key("image", salt, sha256, f"{height}x{width}")


def block_hash(
    parent: bytes, token_ids: Sequence[int], images: Sequence[tuple[bytes, int]]
) -> bytes:
    """Name of the block that holds `token_ids`.

    :param images: key of each picture that has a token in the block, and the index, within the
        picture's tokens, of the first one (negative if the picture starts inside the block).
    """
    digest = hashlib.blake2b(parent, digest_size=DIGEST, person=b"visq-block")
    digest.update(array("q", token_ids).tobytes())
    for key, offset in images:
        digest.update(key + offset.to_bytes(8, "little", signed=True))
    return digest.digest()
