"""What the runs of a worker write when they begin and end, together with what other runs write.

A transaction of its own for each claim and each end costs three times as much (`models.groups`),
and on SQLite they all wait for one writer. Each job's outcome stays its own: what a group leaves
out, and every job of a group that fails, is done alone, with its own error.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import structlog

from models import groups, jobs
from models.database import Database
from models.outcomes import Claim, Outcome, Succeeded, Transition, Work
from visq.errors import Unavailable
from worker.grouped import Grouped, each_alone
from worker.queue import Courier
from worker.token_streams import TokenStream, TokenStreams

log = structlog.get_logger(__name__)


URGENT: Final = 2
"""Claims that are made at once, each by itself, at a time."""

_Delivery: TypeAlias = tuple[TokenStream, Transition]


@dataclass(frozen=True, slots=True)
class _End:
    claim: Claim
    outcome: Outcome


class Committer:
    """Claims, ends and deliveries; each call returns when its job's part is done."""

    def __init__(
        self,
        database: Database,
        courier: Courier,
        streams: TokenStreams,
        worker_id: str,
        lease_seconds: float,
    ) -> None:
        self._database = database
        self._courier = courier
        self._streams = streams
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._at_once = threading.Semaphore(URGENT)
        self._claims: Grouped[str, Work | None] = Grouped("claims", self._claim_all)
        self._ends: Grouped[_End, Transition | None] = Grouped("ends", self._finish_all)
        self._deliveries: Grouped[_Delivery, None] = Grouped("deliveries", self._deliver_all)

    def claim(self, job_id: str, *, urgent: bool = False) -> Work | None:
        """`models.jobs.claim`; what is urgent waits for no group, if there is not much of it.

        :raises Unavailable: the database does not answer.
        """
        if urgent and self._at_once.acquire(blocking=False):
            try:
                return self._claim(job_id)
            finally:
                self._at_once.release()
        return self._claims(job_id)

    def claim_alone(self, job_id: str) -> Work | None:
        """`models.jobs.claim` of a job that must be alone.

        :raises Unavailable: the database does not answer.
        """
        return self._claim(job_id, alone=True)

    def finish(self, claim: Claim, outcome: Outcome) -> Transition | None:
        """`models.jobs.finish`.

        :raises Unavailable: the database does not answer.
        """
        return self._ends(_End(claim, outcome))

    def deliver(self, stream: TokenStream, transition: Transition) -> None:
        """Publish what the end of a run leaves to publish, after the last of its tokens."""
        self._deliveries((stream, transition))

    def close(self) -> None:
        for calls in (self._claims, self._ends, self._deliveries):
            calls.close()

    def _claim_all(self, job_ids: list[str]) -> Sequence[Work | Exception | None]:
        if len(job_ids) == 1:
            return each_alone(self._claim, job_ids)
        try:
            found = self._database.run(
                groups.claim_all,
                job_ids,
                worker=self._worker_id,
                lease_seconds=self._lease_seconds,
            )
        except Unavailable:
            raise  # it would not answer to each of them either
        except Exception:
            log.exception("a group of claims failed; each is tried alone", jobs=len(job_ids))
            found = {}
        alone = [job_id for job_id in job_ids if job_id not in found]
        answers = iter(each_alone(self._claim, alone))
        # A message may come twice: the second one finds nothing.
        return [found.pop(id_, None) if id_ not in alone else next(answers) for id_ in job_ids]

    def _claim(self, job_id: str, *, alone: bool = False) -> Work | None:
        return self._database.run(
            jobs.claim,
            job_id,
            worker=self._worker_id,
            lease_seconds=self._lease_seconds,
            alone=alone,
        )

    def _finish_all(self, ends: list[_End]) -> Sequence[Transition | Exception | None]:
        successes = [(e.claim, e.outcome) for e in ends if isinstance(e.outcome, Succeeded)]
        found: dict[Claim, Transition | None] = {}
        if len(successes) > 1:
            try:
                found = self._database.run(groups.succeed_all, successes)
            except Unavailable:
                raise  # it would not answer to each of them either
            except Exception:
                log.exception("a group of ends failed; each is tried alone", jobs=len(successes))
        alone = [end for end in ends if end.claim not in found]
        answers = iter(each_alone(self._finish, alone))
        return [found[e.claim] if e.claim in found else next(answers) for e in ends]

    def _finish(self, end: _End) -> Transition | None:
        return self._database.run(jobs.finish, end.claim, end.outcome)

    def _deliver_all(self, ended: list[_Delivery]) -> Sequence[Exception | None]:
        try:
            self._streams.settle(stream for stream, _ in ended)
            self._courier.deliver_all([transition for _, transition in ended])
        except Exception:
            if len(ended) == 1:
                raise
            log.exception("a group of deliveries failed; each is tried alone", jobs=len(ended))
            return each_alone(lambda one: self._courier.deliver_all([one[1]]), ended)
        return [None] * len(ended)
