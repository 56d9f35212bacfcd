"""Locks for a migration that changes several tables while visq runs."""

from __future__ import annotations

import random
import time
from typing import Final

from alembic import op
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

TRIES: Final = 100
PATIENCE: Final = "500ms"
"""For the locks at a time: everybody else waits behind them. Shorter than `deadlock_timeout`."""


def lock(*tables: str) -> None:
    """Take `tables` for this migration alone, all of them before it changes the first.

    One after the other would deadlock with a transaction that has the second and wants the first:
    an end of an item has its job, and then wants the batch. Given up and tried again, it waits for
    nobody who waits for it. SQLite has one writer.

    :raises OperationalError: they were not to be had.
    """
    connection = op.get_bind()
    if connection.dialect.name != "postgresql":
        return
    connection.execute(text(f"SET LOCAL lock_timeout = '{PATIENCE}'"))
    for number in range(TRIES):
        try:
            with connection.begin_nested():
                connection.execute(text(f"LOCK TABLE {', '.join(tables)}"))
            break
        except OperationalError:
            if number == TRIES - 1:
                raise
            time.sleep(random.uniform(0.05, 0.3))
    connection.execute(text("SET LOCAL lock_timeout TO DEFAULT"))
