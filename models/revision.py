"""Which schema this version of visq needs, so that a process can refuse another one at start."""

from __future__ import annotations

from typing import Final

from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from visq.errors import ConfigurationError

REVISION: Final = "0004"
"""The newest revision in `migrations` (a test holds them together)."""


def current(session: Session) -> str | None:
    """The database's revision; ``None`` before the first migration."""
    if not inspect(session.connection()).has_table("alembic_version"):
        return None
    revision = session.scalar(text("SELECT version_num FROM alembic_version"))
    return None if revision is None else str(revision)


def check(session: Session) -> None:
    """:raises ConfigurationError: the database is not at `REVISION`."""
    found = current(session)
    if found != REVISION:
        raise ConfigurationError(
            f"the database is at revision {found}, this visq needs {REVISION}: run `visq migrate`"
        )
