"""The loops that make the promises true when processes or servers fail.

They run in every API and worker process, without a leader: rows are taken with SKIP LOCKED, and
every transition is guarded, so that two loops at the same row do no harm. Events have a loop of
their own: a queue that refuses them may take its time, and jobs must not wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import structlog
from sqlalchemy.orm import Session

from models import batch_windows, batches, dispatch, jobs, leases, outbox
from models.database import Database
from models.outcomes import Transition
from visq import points
from visq.errors import Unavailable
from visq.settings import Settings
from visq.types import JobStatus
from worker.queue.courier import Courier
from worker.queue.window import Window

log = structlog.get_logger(__name__)

CHUNK = 200
"""Rows that one step of a round takes."""

SHORTEST_PAUSE = 0.05
"""Seconds between two rounds, however often the loop is woken."""

EVENTS_SECONDS: Final = 8.0
"""Of one round of events; the last of them may wait twice as long more. Less than
`models.outbox.REDELIVERY_SECONDS`, for which they are reserved."""

HEARTBEATS_FIRST: Final = 2
"""So many times living workers may renew their leases after the database was away, before jobs are
taken from those that did not."""


class Maintenance:
    """Two threads, that repeat `round` and `publish_events`; `wake` asks for both soon."""

    def __init__(self, settings: Settings, database: Database, courier: Courier) -> None:
        self._settings = settings
        self._database = database
        self._courier = courier
        self._window = Window(settings, database, courier.redis)
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._whole = False
        """Whether the next round has all steps, however early it is."""
        self._events_woken = threading.Event()
        self._database_away = False
        """Whether the database has not answered since leases were last looked at."""
        self._rescue_after = 0.0
        """By `time.monotonic`: until then, leases ran out because nobody could renew them."""
        self._threads = [
            threading.Thread(target=self._loop, name="maintenance", daemon=True),
            threading.Thread(target=self._events_loop, name="events", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the loops after their present steps."""
        self._stopping.set()
        self._woken.set()
        self._events_woken.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def wake(self) -> None:
        """Run a round soon: there is more to do than one round did, or a batch was cancelled."""
        self._whole = True
        self._woken.set()
        self._events_woken.set()

    def wake_for_windows(self) -> None:
        """Let items of batches into the broker soon: a batch has come, or room in its window."""
        self._woken.set()

    def round(self) -> None:
        """Each step but the events once."""
        self._run(
            self.expire_jobs,
            self.rescue_jobs,
            self.cancel_batch_items,
            self.fill_windows,
            self.publish_jobs,
        )

    def _run(self, *steps: Callable[[], None]) -> None:
        """An outage in one step does not keep the others from running."""
        for step in steps:
            if self._stopping.is_set():
                return
            try:
                step()
            except Unavailable as error:
                log.warning("maintenance step failed", step=step.__name__, error=str(error))
            except Exception:
                # The loop must outlive a bug in one step: the others keep other promises.
                log.exception("maintenance step failed", step=step.__name__)

    def expire_jobs(self) -> None:
        """End waiting and queued jobs whose deadline has passed."""
        with self._outage_noted():
            ids = self._database.read(jobs.past_deadline, CHUNK)
        self._each(ids, jobs.expire)

    def rescue_jobs(self) -> None:
        """Take jobs from workers that have died or lost the database.

        Not from those that it was away from: a lease says nothing until it could be renewed.
        """
        with self._outage_noted():
            ids = self._database.read(leases.without_lease, CHUNK)
            seconds_up = self._database.read(leases.seconds_up) if ids else 0.0
        patience = HEARTBEATS_FIRST * self._settings.heartbeat_seconds
        if self._database_away:
            self._database_away = False
            self._rescue_after = time.monotonic() + patience
        if time.monotonic() < self._rescue_after or seconds_up < patience:
            return

        def rescue(session: Session, job_id: str) -> Transition | None:
            backoff = self._settings.retry_backoff_seconds
            transition = leases.rescue(session, job_id, backoff_seconds=backoff)
            if transition is not None:
                log.warning("lease ran out", job=job_id, status=transition.job.status)
            return transition

        self._each(ids, rescue)

    def cancel_batch_items(self) -> None:
        """End the items that wait in batches that are being cancelled, stop those that run."""
        with self._outage_noted():
            ids = self._database.read(batches.to_cancel, CHUNK)
        self._each(ids, jobs.cancel)

    def fill_windows(self) -> None:
        """Let the next items of batches into the broker."""
        with self._outage_noted():
            self._database.run(
                batch_windows.fill_windows, self._window.most(), self._window.weights()
            )

    def publish_jobs(self) -> None:
        """Publish queued jobs that are due, and again those that the broker seems to have lost."""
        with self._outage_noted():
            due = self._database.run(
                dispatch.reserve_due,
                limit=CHUNK,
                republish_seconds=self._settings.republish_seconds,
            )
        if not due:
            return
        points.reached("jobs.reserved")
        needed = due
        try:
            needed = self._without_those_in_the_broker(due)
            self._courier.broker.publish_jobs([each.job for each in needed])
            points.reached("jobs.published")
        except Unavailable:
            self._database.run(
                dispatch.publish_again_now,
                [each.job.id for each in needed],
                seconds=self._settings.maintenance_seconds,
            )
            raise
        # Repeats that the broker does not need ask for no more: there may be any number of them.
        if len(due) == CHUNK and needed:
            self.wake_for_windows()

    def _without_those_in_the_broker(self, due: list[dispatch.DueJob]) -> list[dispatch.DueJob]:
        """Leave out repeats in lanes whose queue is as long as the database says it must be:
        there a job merely waits for its turn, and a repeat would only make the queue longer."""
        if all(each.publishes == 1 for each in due):
            return due
        expected = self._database.read(dispatch.in_broker)
        complete = {
            lane
            for lane in {each.job.lane for each in due if each.publishes > 1}
            if self._courier.broker.depth(lane) >= expected.get(lane, 0)
        }
        return [each for each in due if each.publishes == 1 or each.job.lane not in complete]

    def publish_events(self) -> None:
        """Publish result events whose process could not."""
        entries = self._database.run(outbox.reserve, CHUNK)
        if entries:
            points.reached("events.reserved")
            self._courier.publish_events(entries, seconds=EVENTS_SECONDS)
        if len(entries) == CHUNK:
            self._events_woken.set()

    def _each(self, job_ids: Sequence[str], transition: Callable[..., Transition | None]) -> None:
        """Make a transition of each job. A job on which it fails does not hold up the others."""
        made: list[Transition | None] = []
        for job_id in job_ids:
            if self._stopping.is_set():
                break
            try:
                with self._outage_noted():
                    made.append(self._database.run(transition, job_id))
            except Unavailable:
                raise
            except Exception:
                log.exception("transition failed", job=job_id)
        # All at once: a broker that is away is waited for once, not for each job.
        done = [each for each in made if each is not None]
        if done:
            points.reached("jobs.moved")
        self._courier.deliver([job for each in done for job in each.queued])
        # A batch is being cancelled, and these items of it run.
        self._courier.nudge_cancel(
            [each.job.id for each in done if each.job.status is JobStatus.RUNNING]
        )
        if len(job_ids) == CHUNK:
            self.wake()
        # For the events' loop: who waits for these may have to wait for a queue.
        if events := [outbox.released(event) for each in done for event in each.events]:
            with self._outage_noted():
                self._database.run(outbox.postpone, events)
            self._events_woken.set()

    @contextmanager
    def _outage_noted(self) -> Iterator[None]:
        """Around what asks nobody but the database."""
        try:
            yield
        except Unavailable:
            self._database_away = True
            raise

    def _events_loop(self) -> None:
        while not self._stopping.is_set():
            self._events_woken.clear()
            self._run(self.publish_events)
            self._stopping.wait(SHORTEST_PAUSE)
            self._events_woken.wait(self._settings.maintenance_seconds)

    def _loop(self) -> None:
        following = 0.0
        while not self._stopping.is_set():
            self._woken.clear()
            if self._whole or time.monotonic() >= following:
                self._whole = False
                following = time.monotonic() + self._settings.maintenance_seconds
                self.round()
            else:
                self._run(self.fill_windows, self.publish_jobs)
            self._stopping.wait(SHORTEST_PAUSE)
            self._woken.wait(max(0.0, following - time.monotonic()))
