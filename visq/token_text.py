"""The text of one token, in JSON.

A token may be a part of a character. Its bytes are then written as OpenAI's API writes them,
``bytes:\\xe2\\x80``, so that nothing is lost: the bytes of consecutive tokens join to the text.
"""

from __future__ import annotations

import re
from typing import Final

_MARK: Final = "bytes:"
_WRITTEN: Final = re.compile(r"bytes:(?:\\x[0-9a-f]{2})+")


def text_of(token: bytes) -> str:
    """The text that stands for a token of these bytes."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        text = ""
    # U+0000 is text too, but PostgreSQL cannot keep it.
    if "\0" not in text and not _WRITTEN.fullmatch(text) and (text or not token):
        return text
    return _MARK + "".join(f"\\x{byte:02x}" for byte in token)


def bytes_of(text: str) -> bytes:
    """The bytes of a token that `text_of` wrote."""
    if _WRITTEN.fullmatch(text):
        return bytes.fromhex(text.removeprefix(_MARK).replace("\\x", ""))
    return text.encode()
