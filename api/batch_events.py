"""The events of a batch as Server-Sent Events: its items as they end, and its counters.

========= =========================================== ==============================================
event     data                                        meaning
========= =========================================== ==============================================
item      the job (`visq.types.JobView`)              an item has ended; its id counts the ends
progress  the batch (`visq.types.BatchView`)          it has changed
end       the batch                                   it has ended; nothing follows
========= =========================================== ==============================================

A reader resumes by ``Last-Event-ID``, the number of the last `item`, at any API process. They are
read from the database, a page at a time: what is slow to read is not kept for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, Final

from sqlalchemy.orm import Session

from api.events import KEEP_ALIVE_SECONDS, shown
from api.watch import Watch
from models import batches
from models.database import TenantDatabase
from models.views import batch_view, job_view
from visq.types import BatchView, JobView

LOOK_SECONDS: Final = 0.5
"""Time between two looks while nothing happens."""
PAGE: Final = 100

BATCH_EVENT_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": ["item", "progress", "end"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
"""One event, for the OpenAPI."""


async def batch_events(
    watch: Watch, database: TenantDatabase, batch_id: str, *, after: int, with_items: bool
) -> AsyncGenerator[str, None]:
    """The events as text, after the end of the item with this number."""
    told: BatchView | None = None
    spoke = time.monotonic()
    while not watch.stopping:
        batch, items = await database.read(_look, batch_id, after, PAGE if with_items else 0)
        for number, job in items:
            after = number
            if job.status.is_terminal:  # or it is retried, and comes again
                yield shown("item", job.model_dump_json(), str(number))
        if batch != told:
            told = batch
            if batch.status.is_terminal and len(items) < PAGE:
                yield shown("end", batch.model_dump_json())
                return
            yield shown("progress", batch.model_dump_json())
            spoke = time.monotonic()
        elif time.monotonic() - spoke > KEEP_ALIVE_SECONDS:
            yield ": keep-alive\n\n"
            spoke = time.monotonic()
        if len(items) < PAGE:
            await asyncio.sleep(LOOK_SECONDS)
        elif batch.status.is_terminal:
            told = None  # its end is still to be told


def _look(
    session: Session, batch_id: str, after: int, limit: int
) -> tuple[BatchView, list[tuple[int, JobView]]]:
    """The batch first: what ends after this look at it is in the next one."""
    batch = batch_view(batches.get(session, batch_id))
    items = batches.ended_items(session, batch_id, after_number=after, limit=limit) if limit else []
    return batch, [(number, job_view(job)) for number, job in items]
