"""The runs of one worker: leases that are renewed, and the ways a run is stopped from outside.

A run is stopped because its job was cancelled, because its lease was lost (then it must write
nothing more), or because the worker shuts down (then its job is handed back).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import redis
import structlog

from models import jobs
from models.database import Database
from models.outcomes import Claim, HandedBack
from visq.errors import Unavailable
from visq.settings import Settings
from visq.streams import CANCEL_CHANNEL, WorkerInfo, announce_worker, withdraw_worker
from visq.types import JobStatus
from worker.engine.face import Handle

log = structlog.get_logger(__name__)

StopReason = Literal["cancelled", "lost", "shutdown"]


class Run:
    """One attempt of one job in this worker. Thread-safe."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self._lock = threading.Lock()
        self._handle: Handle | None = None
        self._stop_reason: StopReason | None = None
        self._began = time.monotonic()
        self.outcome: JobStatus | None = None
        """The job's state after the run; ``None`` while it runs, and if the lease was lost."""

    @property
    def stop_reason(self) -> StopReason | None:
        return self._stop_reason

    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self._began

    def stop(self, reason: StopReason) -> None:
        """Stop the run; a lost lease outranks the other reasons."""
        with self._lock:
            if self._stop_reason is None or reason == "lost":
                self._stop_reason = reason
            handle = self._handle
        if handle is not None:
            handle.cancel()

    def attach(self, handle: Handle) -> None:
        """The run is in the engine now; a stop that came before takes effect at once."""
        with self._lock:
            self._handle = handle
            stopped = self._stop_reason is not None
        if stopped:
            handle.cancel()


class Runs:
    """All runs of this worker, and the two threads that watch over them."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        client: redis.Redis,
        describe: Callable[[int], WorkerInfo],
    ) -> None:
        """:param describe: what to announce, given the number of jobs in flight."""
        self._settings = settings
        self._database = database
        self._redis = client
        self._describe = describe
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._shutting_down = False
        self._doubtful = False
        """Whether claims were asked for that may have been given without our hearing of it."""
        self._unheld: set[Claim] = set()
        """Claims that the database knew of and we did not, at the last look."""
        self.on_end: Callable[[Run], None] | None = None
        """Told of each run that has ended."""
        self._threads = [
            threading.Thread(target=self._beat, name="heartbeat", daemon=True),
            threading.Thread(target=self._listen, name="cancel", daemon=True),
        ]

    @property
    def shutting_down(self) -> bool:
        """Whether runs hand their jobs back."""
        return self._shutting_down

    @property
    def in_flight(self) -> int:
        """Runs that have not ended."""
        return len(self._runs)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[Run]:
        """A run whose lease is renewed until the block ends."""
        run = Run(claim)
        with self._lock:
            if (earlier := self._runs.get(claim.job_id)) is not None:
                earlier.stop("lost")  # this process stood still for longer than its lease
            self._runs[claim.job_id] = run
            if self._shutting_down:
                run.stop("shutdown")
        try:
            yield run
        finally:
            with self._lock:
                if self._runs.get(claim.job_id) is run:
                    del self._runs[claim.job_id]
            if self.on_end is not None:
                self.on_end(run)

    def hand_back_all(self) -> None:
        """The worker's grace is over: every run, and every later one, hands its job back."""
        with self._lock:
            self._shutting_down = True
            runs = list(self._runs.values())
        if runs:
            log.warning("handing back the running jobs", jobs=len(runs))
        for run in runs:
            run.stop("shutdown")

    def close(self) -> None:
        """End the threads and take back the announcement."""
        self._closing.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        try:
            withdraw_worker(self._redis, self._describe(0).id)
        except redis.RedisError:
            log.info("announcement left to its time-out")

    def heartbeat(self) -> None:
        """Renew all leases; stop the runs whose jobs were cancelled or lost.

        :raises Unavailable: the database does not answer.
        """
        if self._doubtful:
            self._hand_back_unheld()
        with self._lock:
            runs = dict(self._runs)
        if not runs:
            return
        renewed = self._database.run(
            jobs.renew,
            [run.claim for run in runs.values()],
            lease_seconds=self._settings.lease_seconds,
        )
        alive = {each.claim.job_id for each in renewed}
        for each in renewed:
            if each.cancel_requested:
                runs[each.claim.job_id].stop("cancelled")
        with self._lock:
            # A run that ended meanwhile is not lost, it is just no longer there.
            lost = [run for id_, run in runs.items() if id_ not in alive and id_ in self._runs]
        for run in lost:
            run.stop("lost")

    def doubt_claims(self) -> None:
        """A claim has met an outage: the database may have given it, and then nobody runs it."""
        self._doubtful = True

    def _hand_back_unheld(self) -> None:
        """Hand back what the database says that we hold, and we do not: at the second look, since
        a claim may just be on its way."""
        worker_id = self._describe(0).id
        with self._lock:
            held = {run.claim for run in self._runs.values()}
        unheld = set(self._database.read(jobs.claims_of, worker_id)) - held
        for claim in unheld & self._unheld:
            log.warning("handing back a claim that nobody runs", job=claim.job_id)
            self._database.run(jobs.finish, claim, HandedBack("the answer to its claim was lost"))
        self._doubtful = bool(unheld - self._unheld)
        self._unheld = unheld

    def _announce(self) -> None:
        info = self._describe(self.in_flight)
        ttl = max(1, round(3 * self._settings.heartbeat_seconds))
        try:
            announce_worker(self._redis, info, ttl_seconds=ttl)
        except (redis.RedisError, OSError) as error:
            log.warning("worker not announced", error=str(error))

    def _beat(self) -> None:
        while not self._closing.is_set():
            try:
                self.heartbeat()
            except Unavailable as error:
                log.warning("leases not renewed", error=str(error))
            except Exception:
                log.exception("heartbeat failed")
            self._announce()  # after the leases: a Redis that hangs must not cost any
            self._closing.wait(self._settings.heartbeat_seconds)

    def _listen(self) -> None:
        """Stop runs at once when the API says so; without Redis the heartbeat does it later."""
        while not self._closing.is_set():
            try:
                with self._redis.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
                    channel.subscribe(CANCEL_CHANNEL)
                    while not self._closing.is_set():
                        note = channel.get_message(timeout=1.0)
                        if note is not None:
                            self._cancel(note["data"].decode(errors="replace"))
            except (redis.RedisError, OSError) as error:
                log.warning("not listening for cancels", error=str(error))
                self._closing.wait(1.0)
            except Exception:
                log.exception("not listening for cancels")
                self._closing.wait(1.0)

    def _cancel(self, job_id: str) -> None:
        with self._lock:
            run = self._runs.get(job_id)
        if run is not None:
            run.stop("cancelled")
