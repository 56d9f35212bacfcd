"""Rounds of faults under load, and what was proven at the end of each: ``make faults``.

``python -m tests.faults.rounds --rounds 200 --seed 1``: the scenarios of `tests.faults.scenarios`
take turns on three systems; a round submits `Amounts`, breaks something, heals it, waits for the
end of all jobs, and checks. Any round can be repeated: its scenario, system and seed are printed.
(The faults and their times are seeded; how the threads of many processes interleave is not.)
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import redis
import structlog
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from sqlalchemy import func, select

from models.database import Database, db_now
from models.tables import Job, Outbox
from tests.faults.checker import Evidence, Rows, Violation, check
from tests.faults.load import QUEUE, Amounts, Load, put_pictures
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.system import BrokerKind, DatabaseKind, System
from visq import consume
from visq.cloudevents import result_queue_name
from visq.consumer import Event
from visq.errors import Unavailable
from visq.streams import job_key
from visq.types import JobStatus

END_SECONDS: Final = 150.0
"""After the fault, all jobs must have ended within this."""
START_SECONDS: Final = 15.0
"""The fault comes after this at the latest."""
TOLD_SECONDS: Final = 30.0
"""And the world must know of it within this, then."""

TERMINAL: Final = [status for status in JobStatus if status.is_terminal]


@dataclass
class Round:
    """What happened in one round."""

    scenario: str
    system: str
    seed: int
    jobs: int
    did: str
    seconds: float
    """From the first submission until all had ended and all was told."""
    attempts: dict[str, int]
    """How many jobs took how many attempts."""
    violations: list[str] = field(default_factory=list)


class Collector:
    """Consumes the result queue with `visq.consume`, in a thread."""

    def __init__(self, broker_url: str) -> None:
        self.events: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._consume, args=(broker_url,), daemon=True)
        self._thread.start()

    def _consume(self, broker_url: str) -> None:
        consume(
            result_queue_name("acme", QUEUE),
            self._take,
            broker_url=broker_url,
            stop=self._stop,
            redeliver_after=10.0,
            max_pause=1.0,
        )

    def _take(self, event: Event) -> None:
        data = event.job.model_dump(mode="json")
        self.events[event.job.id].append({"id": event.id, "data": data})

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30)


class Arena:
    """A system with its collector, for many rounds. A context manager."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.name = f"{system.database}, {system.broker}"

    def __enter__(self) -> Arena:
        self.system.__enter__()
        self.database = Database(self.system.database_url)
        self.redis = redis.Redis.from_url(
            self.system.redis_url, retry=Retry(ConstantBackoff(0.2), 50)
        )
        self.collector = Collector(self.system.broker_url)
        self.pictures = put_pictures(self.system)
        return self

    def __exit__(self, *error: Any) -> None:
        self.collector.close()
        self.database.close()
        self.redis.close()
        self.system.__exit__(*error)
        left = self.system.left_behind()
        assert not left, f"processes that outlived their system: {left}"

    def round(
        self,
        scenario: Scenario,
        seed: int,
        amounts: Amounts,
        *,
        end_seconds: float = END_SECONDS,
        told_seconds: float = TOLD_SECONDS,
    ) -> Round:
        chance = random.Random(seed)
        system = self.system
        after = self._newest()
        lost, redis_lost = None, system.redis_lost
        begun = time.monotonic()
        load = Load(system, seed, amounts, self.pictures, poison=scenario.poison)
        load.start()
        self._let_it_run(after, round(amounts.total * chance.uniform(0.02, 0.5)))
        did = scenario.run(system, chance)
        system.heal()
        if system.redis_lost > redis_lost:
            lost = self.ask(lambda session: session.scalar(select(db_now())))
        ended = system.wait_for(lambda: load.done and self.unfinished(after) == 0, end_seconds)
        system.wait_for(lambda: self._told(after, lost), told_seconds)
        seconds = time.monotonic() - begun
        rows = self.ask(lambda session: Rows.read(session.connection(), after))
        keys = list(rows.jobs)
        values = self.redis.mget([job_key(id_) for id_ in keys]) if keys else []
        evidence = Evidence(
            {id_: self.collector.events.pop(id_, []) for id_ in keys},
            {k: json.loads(v) for k, v in zip(keys, values, strict=True) if v is not None},
            objects=self.system.objects(),
            lost_before=lost,
        )
        violations = check(load.ledger, rows, evidence)
        if not ended:
            violations.insert(0, Violation("lost", "round", f"not over {end_seconds:g} s after"))
        attempts = Counter(str(job.attempt) for job in rows.jobs.values())
        return Round(
            scenario.name,
            self.name,
            seed,
            load.ledger.total,
            did,
            round(seconds, 1),
            dict(sorted(attempts.items())),
            [str(each) for each in violations],
        )

    def _let_it_run(self, after: str, jobs: int) -> None:
        """Until so many of the round's jobs have ended, and others are under way."""
        ended = select(func.count()).where(Job.id > after, Job.finished_at.is_not(None))
        running = select(func.count()).where(Job.id > after, Job.status == JobStatus.RUNNING)

        def under_way() -> bool:
            counts = self.ask(lambda s: (s.scalar(ended) or 0, s.scalar(running) or 0))
            return bool(counts[0] >= jobs and counts[1])

        self.system.wait_for(under_way, START_SECONDS)

    def _newest(self) -> str:
        return self.ask(lambda session: session.scalar(select(func.max(Job.id)))) or "job_"

    def unfinished(self, after: str) -> int:
        unfinished = select(func.count()).where(Job.id > after, Job.status.not_in(TERMINAL))
        return self.ask(lambda session: session.scalar(unfinished)) or 0

    def _told(self, after: str, lost: datetime | None) -> bool:
        """Whether the outbox is empty and every job's event has come."""
        if self.ask(lambda session: session.scalar(select(func.count()).select_from(Outbox))):
            return False
        ended = select(Job.id).where(Job.id > after)
        if lost is not None:
            ended = ended.where(Job.finished_at > lost)
        ids = self.ask(lambda session: session.scalars(ended).all())
        return all(id_ in self.collector.events for id_ in ids)

    def ask(self, question: Any) -> Any:
        """The database, patiently: it may just have been restarted."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.database.read(question)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


SYSTEMS: Final[Sequence[tuple[DatabaseKind, BrokerKind, float]]] = (
    ("postgresql", "redis", 0.5),
    ("postgresql", "rabbitmq", 0.3),
    ("sqlite", "redis", 0.2),
)
"""With the share of all rounds."""


def plan(rounds: int, seed: int) -> Iterator[tuple[DatabaseKind, BrokerKind, list[int]]]:
    """The seeds of the rounds on each system."""
    seeds = iter(range(seed * 1_000_000, seed * 1_000_000 + rounds))
    left = rounds
    for number, (database, broker, share) in enumerate(SYSTEMS):
        count = left if number == len(SYSTEMS) - 1 else min(left, round(rounds * share))
        left -= count
        yield database, broker, [next(seeds) for _ in range(count)]


def main() -> None:
    args = _arguments()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    amounts = Amounts(batches=args.batches, items=args.items)
    done: list[Round] = []
    begun = time.monotonic()
    for database, broker, seeds in plan(args.rounds, args.seed):
        if not seeds or (args.system and args.system != f"{database},{broker}"):
            continue
        with tempfile.TemporaryDirectory(prefix="visq-faults-") as folder:
            if args.keep:
                folder = args.keep / f"{database}-{broker}"
            with Arena(System(Path(folder), database, broker)) as arena:
                fitting = [s for s in SCENARIOS if s.fits(arena.system)]
                if args.only:
                    fitting = [s for s in fitting if args.only in s.name]
                for number, seed in enumerate(seeds):
                    found = arena.round(fitting[number % len(fitting)], seed, amounts)
                    done.append(found)
                    _tell(found)
                    if args.report:
                        with args.report.open("a") as lines:
                            lines.write(json.dumps(asdict(found)) + "\n")
    total = sum(each.jobs for each in done)
    broken = [each for each in done if each.violations]
    print(
        f"{len(done)} rounds, {total} jobs, {time.monotonic() - begun:.0f} s: "
        f"{sum(len(each.violations) for each in broken)} violations in {len(broken)} rounds"
    )
    sys.exit(1 if broken else 0)


def _tell(found: Round) -> None:
    verdict = "ok" if not found.violations else f"{len(found.violations)} VIOLATIONS"
    print(
        f"[{found.system}; seed {found.seed}] {found.scenario}: {found.did}; {found.jobs} jobs, "
        f"attempts {found.attempts}, {found.seconds} s: {verdict}",
        flush=True,
    )
    for each in found.violations[:10]:
        print(f"    {each}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batches", type=int, default=Amounts.batches)
    parser.add_argument("--items", type=int, default=Amounts.items, help="of each batch")
    parser.add_argument("--only", help="scenarios with these words in their names")
    parser.add_argument("--system", help="such as postgresql,redis")
    parser.add_argument(
        "--report", type=Path, help="a file that gets a line of JSON for each round"
    )
    parser.add_argument("--keep", type=Path, help="keep logs and data in this folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
