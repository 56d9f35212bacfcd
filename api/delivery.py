"""Publishing after the commit, off the event loop: requests that come together go together.

The response waits for it, but never long: what a broken broker does not take now, the maintenance
loop publishes later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import structlog

from models.outbox import OutboxEntry
from models.outcomes import QueuedJob, Transition
from visq.types import JobStatus
from worker.queue import Courier

log = structlog.get_logger(__name__)

PATIENCE_SECONDS: Final = 1.0
"""How long a response waits."""

MAX_BACKLOG: Final = 1000
"""More than this is left to the maintenance loop at once."""


@dataclass(frozen=True)
class _Parcel:
    queued: Sequence[QueuedJob]
    events: Sequence[OutboxEntry]
    stopping: Sequence[str]
    delivered: asyncio.Future[None]


class Delivery:
    """One thread at the courier, for all requests of this process."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="delivery")
        self._backlog: list[_Parcel] = []
        self._pump: asyncio.Task[None] | None = None

    async def transitions(self, transitions: Sequence[Transition]) -> None:
        """Publish what these transitions leave to publish; a job that still runs was asked to
        stop, so its worker is told."""
        await self.parcel(
            [job for transition in transitions for job in transition.queued],
            [event for transition in transitions for event in transition.events],
            [each.job.id for each in transitions if each.job.status is JobStatus.RUNNING],
        )

    async def parcel(
        self,
        queued: Sequence[QueuedJob] = (),
        events: Sequence[OutboxEntry] = (),
        stopping: Sequence[str] = (),
    ) -> None:
        """Publish, or leave it to the maintenance loop."""
        if not (queued or events or stopping) or len(self._backlog) >= MAX_BACKLOG:
            return
        delivered = asyncio.get_running_loop().create_future()
        self._backlog.append(_Parcel(queued, events, stopping, delivered))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        await asyncio.wait([delivered], timeout=PATIENCE_SECONDS)

    async def close(self) -> None:
        """Wait a little for what is under way."""
        if self._pump is not None:
            await asyncio.wait([self._pump], timeout=PATIENCE_SECONDS)
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._backlog:
            parcels, self._backlog = self._backlog, []
            await loop.run_in_executor(self._executor, self._deliver, parcels)
            for parcel in parcels:
                parcel.delivered.set_result(None)

    def _deliver(self, parcels: list[_Parcel]) -> None:
        try:
            stopping = [job_id for parcel in parcels for job_id in parcel.stopping]
            if stopping:
                self._courier.nudge_cancel(stopping)
            self._courier.deliver(
                [job for parcel in parcels for job in parcel.queued],
                [event for parcel in parcels for event in parcel.events],
            )
        except Exception:
            # A bug here must not end the thread's work for every later request.
            log.exception("delivery failed; left for the maintenance loop")
