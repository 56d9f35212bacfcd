"""Whether leases that have run out say that their workers are dead."""

from __future__ import annotations

import math
from typing import Final

from sqlalchemy import text
from sqlalchemy.orm import Session

_SECONDS_UP: Final = text(
    "SELECT extract(epoch FROM statement_timestamp() - pg_postmaster_start_time())"
)


def seconds_up(session: Session) -> float:
    """How long the database has been up: nobody could renew a lease before. Infinite on SQLite,
    which has no server."""
    if session.get_bind().dialect.name != "postgresql":
        return math.inf
    return float(session.execute(_SECONDS_UP).scalar_one())
