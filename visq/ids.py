"""Identifiers: a readable prefix and a UUIDv7 (RFC 9562), e.g. ``job_0197f2a4c1d87cc2...``.

UUIDv7 begins with the time in milliseconds, so ids sort by creation and index well.
"""

from __future__ import annotations

from typing import Final

import uuid_utils

ID_LENGTH: Final = 4 + 32
"""Length of every id: a three-letter prefix, ``_``, and 32 hexadecimal digits."""


def new_id(prefix: str) -> str:
    """Return a new id such as ``job_0197f2a4c1d87cc2a1b2c3d4e5f60718``; `prefix` has 3 letters."""
    return f"{prefix}_{uuid_utils.uuid7().hex}"


def earliest_id(prefix: str, at: float) -> str:
    """What no id is less than that is made at or after `at` (seconds since 1970)."""
    return f"{prefix}_{max(0, int(at * 1000)):012x}{0:020x}"
