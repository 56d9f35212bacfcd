"""Clients and workers at one database, as the real ones use it, and a check of what they leave.

What ends in `Unavailable` they do again: clients with the same key, workers with the same claim.
Anything else that a transaction raises is a failure of the test.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from models import batch_windows, groups, jobs, leases, outbox, reading, sessions, submit
from models.database import Database, db_now
from models.outcomes import Failed, Outcome, Succeeded, Work
from models.tables import Batch, ChatSession, Job, JobEvent, Message, Outbox
from tests.models.conftest import answered
from tests.waiting import until
from visq.errors import EngineCrashed, Unavailable
from visq.types import TERMINAL, BatchRequest, BatchStatus, JobRequest, JobStatus

P = ParamSpec("P")
T = TypeVar("T")

LEASE_SECONDS = 1.0


class Load:
    """`running()` keeps it up; `settle()` afterwards lets all end, and checks everything."""

    def __init__(self, database: Database, seed: int, clients: int = 3, workers: int = 3) -> None:
        self._run: Callable[..., Any] = database.run
        self._read: Callable[..., Any] = database.read
        self._tenant = self._surely(reading.ensure_tenants, ["acme"])["acme"]
        opened = [self._surely(sessions.open_session, self._tenant, {}) for _ in range(2)]
        self._sessions = [each.id for each in opened]
        self._seed = seed
        self._clients, self._workers = clients, workers
        self._stopping = threading.Event()
        self.accepted: set[str] = set()
        """Ids of the jobs that clients were told of."""
        self.outages = 0
        """How often a transaction ended in `Unavailable`."""
        self.ends: dict[str, set[str]] = defaultdict(set)
        """Job -> ids of its result events."""
        self.errors: list[BaseException] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        workers = [self._thread(self._work, n) for n in range(self._workers)]
        workers.append(self._thread(self._maintain, self._workers))
        clients = [self._thread(self._submit, 100 + n) for n in range(self._clients)]
        try:
            yield
        finally:
            self._stopping.set()
            for thread in [*clients, *workers]:
                thread.join(60)
                assert not thread.is_alive(), "a thread of the load hangs"
        assert self.errors == []

    def settle(self) -> None:
        """Let every job end, without faults, and check what is there."""
        self._stopping.clear()
        threads = [self._thread(self._work, 200), self._thread(self._maintain, 201)]
        until(lambda: self._surely(_unfinished) == 0 or self.errors, 60, "all jobs to end")
        self._stopping.set()
        for thread in threads:
            thread.join(60)
        assert self.errors == []
        self._run(lambda session: session.execute(update(Outbox).values(available_at=db_now())))
        while entries := self._run(outbox.reserve, 500):
            self._deliver(entries)
        self._read(self._check)

    def _check(self, session: Session) -> None:
        rows = session.scalars(select(Job).order_by(Job.id)).all()
        batch_rows = session.scalars(select(Batch)).all()
        assert {job.id for job in rows} == self.accepted
        assert {
            job.id for job in rows if job.status not in TERMINAL or job.lease_expires_at
        } == set()
        keys = Counter(job.idempotency_key for job in rows if job.batch_id is None)
        assert max(keys.values()) == 1
        assert {job.id: len(self.ends[job.id]) for job in rows} == {job.id: 1 for job in rows}
        for job in rows:
            events = session.scalars(
                select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.id)
            ).all()
            assert all(a.to_status == b.from_status for a, b in pairwise(events)), job.id
            assert [e.to_status for e in events if e.to_status in TERMINAL] == [job.status]
            assert sum(e.to_status is JobStatus.RUNNING for e in events) == job.attempt
        for conversation in session.scalars(select(ChatSession)):
            turns = [job for job in rows if job.session_id == conversation.id]
            assert sorted(job.turn or 0 for job in turns) == list(range(1, conversation.turns + 1))
            succeeded = sorted(job.turn or 0 for job in turns if job.status == "succeeded")
            messages = session.execute(
                select(Message.turn, Message.role)
                .where(Message.session_id == conversation.id)
                .order_by(Message.turn, Message.position)
            ).all()
            expected = [(turn, role) for turn in succeeded for role in ("user", "assistant")]
            assert [tuple(row) for row in messages] == expected
        for batch in batch_rows:
            counted = Counter(job.status for job in rows if job.batch_id == batch.id)
            assert batch.status is BatchStatus.COMPLETED
            assert (batch.succeeded, batch.failed) == (counted["succeeded"], counted["failed"])
            assert batch.total == counted.total()

    # --- its threads ---

    def _thread(self, target: Callable[[random.Random], None], number: int) -> threading.Thread:
        def run() -> None:
            try:
                target(random.Random(f"{self._seed}/{number}"))
            except BaseException as error:  # noqa: BLE001 (the test is told of it)
                self.errors.append(error)

        thread = threading.Thread(target=run, name=f"load-{number}", daemon=True)
        thread.start()
        return thread

    def _submit(self, chance: random.Random) -> None:
        me, count = chance.randrange(1 << 30), 0
        while not self._stopping.is_set():
            count += 1
            key = f"{me}-{count}"
            if chance.random() < 0.2:
                items = [{"custom_id": f"{n}", "prompt": "x"} for n in range(3)]
                batch = self._surely(
                    submit.submit_batch,
                    self._tenant,
                    BatchRequest.model_validate({"items": items}),
                    max_attempts=100,
                    idempotency_key=key,
                ).batch
                self.accepted.update(self._surely(_items, batch.id))
                continue
            session_id = chance.choice([None, *self._sessions])
            request = JobRequest.model_validate({"prompt": "x", "session_id": session_id})
            submitted = self._surely(
                submit.submit_job,
                self._tenant,
                request,
                max_attempts=100,
                idempotency_key=key,
            )
            self.accepted.add(submitted.job.id)
            time.sleep(0.005)

    def _work(self, chance: random.Random) -> None:
        name = f"w{chance.randrange(1 << 30)}"
        while not self._stopping.is_set():
            there = self._once(self._read, _queued) or []
            ids = chance.sample(there, min(len(there), chance.randint(1, 4)))
            works = self._once(self._claim, ids, name) or []
            ends = [(work, _outcome(chance, work)) for work in works]
            if len(ends) > 1 and all(isinstance(end, Succeeded) for _, end in ends):
                group = [(work.claim, end) for work, end in ends if isinstance(end, Succeeded)]
                made = self._once(self._run, groups.succeed_all, group) or {}
                self._ended(made.values())
                ends = [(work, end) for work, end in ends if work.claim not in made]
            for work, end in ends:
                self._ended([self._surely(jobs.finish, work.claim, end)])
            if not works:
                time.sleep(0.01)

    def _claim(self, ids: list[str], worker: str) -> list[Work]:
        run = self._run
        if len(ids) > 1:
            found = run(groups.claim_all, ids, worker=worker, lease_seconds=LEASE_SECONDS)
            return [work for work in found.values() if work is not None]
        for alone in (False, True):
            for id_ in ids:
                work = run(jobs.claim, id_, worker=worker, lease_seconds=LEASE_SECONDS, alone=alone)
                if work is not None:
                    return [work]
        return []

    def _maintain(self, chance: random.Random) -> None:
        while not self._stopping.is_set():
            for id_ in self._once(self._read, leases.without_lease, 50) or []:
                self._ended([self._once(self._run, leases.rescue, id_, backoff_seconds=0.0)])
            self._once(self._run, batch_windows.fill_windows, 10)
            self._deliver(self._once(self._run, outbox.reserve, 50) or [])
            time.sleep(0.05)

    def _ended(self, transitions: Any) -> None:
        self._deliver([e for each in transitions if each is not None for e in each.events])

    def _deliver(self, entries: list[outbox.OutboxEntry]) -> None:
        for entry in entries:
            self.ends[entry.payload["data"]["id"]].add(entry.id)
        if entries:
            self._once(self._run, outbox.done, [entry.id for entry in entries])

    def _once(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return call(*args, **kwargs)
        except Unavailable:
            self.outages += 1
            return None

    def _surely(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        give_up = time.monotonic() + 60
        while True:
            try:
                return self._run(function, *args, **kwargs)
            except Unavailable:
                self.outages += 1
                if time.monotonic() > give_up:
                    raise
            time.sleep(0.02)


def _outcome(chance: random.Random, work: Work) -> Outcome:
    if chance.random() < 0.2:
        return Failed(EngineCrashed("the engine died"), backoff_seconds=0.0)
    return answered(work, "a cat")


def _all_events_due(session: Session) -> None:
    session.execute(update(Outbox).values(available_at=db_now()))


def _unfinished(session: Session) -> int:
    return session.scalar(text("SELECT count(*) FROM jobs WHERE finished_at IS NULL")) or 0


def _queued(session: Session) -> list[str]:
    ready = select(Job.id).where(Job.status == JobStatus.QUEUED, Job.publish_at.is_not(None))
    return list(session.scalars(ready.order_by(Job.id).limit(12)))


def _items(session: Session, batch_id: str) -> list[str]:
    return list(session.scalars(select(Job.id).where(Job.batch_id == batch_id)))
