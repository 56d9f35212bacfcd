"""Rounds of faults under load, and what was proven at the end of each: ``make faults``.

``python -m tests.faults.rounds --rounds 200 --seed 1``: the scenarios of `tests.faults.scenarios`
take turns on three systems; a round submits `Amounts`, breaks something, heals it, waits for the
end of all jobs, and checks. The faults and their times are seeded; how the threads of many
processes interleave, and so how many jobs the trickle has, is not. ``--only NAME --round-seed N``
repeats a round.

A round in which the fault has met nothing is told as "not struck": it proves nothing.

How rounds are shared out (`plan`): where there are enough of them, each system gets as many as it
has scenarios, so that each scenario that can happen on a system does; what is left goes to the
systems by `SHARES`. Fewer rounds are shared out in the same proportions, and which scenarios they
have depends on the seed.
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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import redis
import structlog
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from sqlalchemy import func, literal, select

from models.tables import Batch, Job, JobEvent, Outbox
from tests.faults.checker import check
from tests.faults.evidence import Evidence, Rows, Violation
from tests.faults.load import QUEUE, Amounts, Load
from tests.faults.scenarios import Scenario, fitting_scenarios
from tests.faults.system import BrokerKind, DatabaseKind, System
from tests.faults.table import as_table
from visq import consume
from visq.cloudevents import result_queue_name
from visq.consumer import Event
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
    struck: int
    """How often the fault met something to break; 0: the round proves nothing."""
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
        data = event.data.model_dump(mode="json")
        self.events[event.data.id].append({"id": event.id, "data": data})

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
        self.redis = redis.Redis.from_url(
            self.system.redis_url, retry=Retry(ConstantBackoff(0.2), 50)
        )
        self.collector = Collector(self.system.broker_url)
        return self

    def __exit__(self, *error: Any) -> None:
        self.collector.close()
        self.redis.close()
        self.system.__exit__(*error)
        # The resource tracker of a killed worker frees its shared memory a moment later.
        deadline = time.monotonic() + 5
        while (left := self.system.left_behind()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left behind by their system: {left}"

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
        after = system.newest_job()
        system.redis_lost_at = None
        system.gallery.begin_round()
        pictures = system.gallery.pictures
        begun = time.monotonic()
        put = system.gallery.put_file
        load = Load(system.urls, seed, amounts, pictures, put, poison=scenario.poison)
        load.start()
        self._let_it_run(after, round(amounts.total * chance.uniform(0.02, 0.5)))
        struck, did = scenario.run(system, chance)
        system.heal()
        load.finish()
        lost = system.redis_lost_at
        ended = system.wait_for(lambda: load.done and self.unfinished(after) == 0, end_seconds)
        system.wait_for(lambda: self._told(after, lost), told_seconds)
        seconds = time.monotonic() - begun
        rows = system.ask(lambda session: Rows.read(session.connection(), after))
        keys = list(rows.jobs)
        values = self.redis.mget([job_key(id_) for id_ in keys]) if keys else []
        evidence = Evidence(
            {id_: self.collector.events.pop(id_, []) for id_ in [*keys, *rows.batches]},
            {k: json.loads(v) for k, v in zip(keys, values, strict=True) if v is not None},
            objects=system.objects(),
            files=system.gallery.files(),
            unfinished_uploads=system.gallery.unfinished_uploads(),
            lost_before=lost,
            events_in_redis=system.broker == "redis",
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
            struck,
            round(seconds, 1),
            dict(sorted(attempts.items())),
            [str(each) for each in violations],
        )

    def _let_it_run(self, after: str, jobs: int) -> None:
        """Until so many of the round's jobs have ended, and others are under way."""
        ended = select(func.count()).where(Job.id > after, Job.finished_at.is_not(None))
        running = select(func.count()).where(Job.id > after, Job.status == JobStatus.RUNNING)

        def under_way() -> bool:
            counts = self.system.ask(lambda s: (s.scalar(ended) or 0, s.scalar(running) or 0))
            return bool(counts[0] >= jobs and counts[1])

        self.system.wait_for(under_way, START_SECONDS)

    def unfinished(self, after: str) -> int:
        """Jobs and batches; of a batch from a file, no job may be there yet."""
        jobs = select(func.count()).where(Job.id > after, Job.status.not_in(TERMINAL))
        batches = select(func.count()).where(
            Batch.id > _batches_after(after), Batch.finished_at.is_(None)
        )
        return self.system.ask(lambda s: (s.scalar(jobs) or 0) + (s.scalar(batches) or 0))

    def _told(self, after: str, lost: datetime | None) -> bool:
        """Whether the outbox is empty and the events of all ends have come."""
        left = select(func.count()).select_from(Outbox)
        if self.system.ask(lambda session: session.scalar(left)):
            return False
        ends = (
            select(JobEvent.job_id, func.count())
            .where(JobEvent.job_id > after, JobEvent.to_status.in_(TERMINAL))
            .group_by(JobEvent.job_id)
        )
        batches = select(Batch.id, literal(1)).where(
            Batch.id > _batches_after(after), Batch.result_queue.is_not(None)
        )
        if lost is not None and self.system.broker == "redis":
            ends = ends.where(JobEvent.at > lost)
            batches = batches.where(Batch.finished_at > lost)
        wanted = self.system.ask(lambda s: [*s.execute(ends).all(), *s.execute(batches).all()])
        events = self.collector.events
        return all(len({e["id"] for e in events.get(id_, ())}) >= count for id_, count in wanted)


def _batches_after(job_id: str) -> str:
    """Ids begin with the time: those of the batches that came after the job are greater."""
    return job_id.replace("job_", "bat_")


SHARES: Final[Mapping[tuple[DatabaseKind, BrokerKind], float]] = {
    ("postgresql", "redis"): 0.5,
    ("postgresql", "rabbitmq"): 0.3,
    ("sqlite", "redis"): 0.2,
}
"""Of the rounds that are left when each scenario has been on each system."""

Planned = tuple[Scenario, int]
"""A scenario and the seed of its round."""


def plan(
    rounds: int, seed: int, *, only: str = "", system: str = ""
) -> dict[tuple[DatabaseKind, BrokerKind], list[Planned]]:
    """The rounds on each system.

    :param only: of scenarios with these words in their names.
    :param system: all of them on this one, such as ``postgresql,redis``.
    """
    scenarios = {
        kind: [each for each in fitting_scenarios(*kind) if only in each.name]
        for kind in SHARES
        if system in ("", ",".join(kind))
    }
    needed = {kind: len(fitting) for kind, fitting in scenarios.items() if fitting}
    if not needed:
        return {}
    enough = rounds >= sum(needed.values())
    counts = needed if enough else dict.fromkeys(needed, 0)
    left = rounds - sum(counts.values())
    weights = {kind: SHARES[kind] if enough else needed[kind] for kind in needed}
    shares = {kind: int(left * weight / sum(weights.values())) for kind, weight in weights.items()}
    counts = {kind: counts[kind] + shares[kind] for kind in needed}
    counts[next(iter(needed))] += rounds - sum(counts.values())  # what rounding has left
    seeds = iter(range(seed * 1_000_000, seed * 1_000_000 + rounds))
    planned = {}
    for kind, count in counts.items():
        fitting = scenarios[kind]
        random.Random(f"{seed} {kind}").shuffle(fitting)
        planned[kind] = [(fitting[number % len(fitting)], next(seeds)) for number in range(count)]
    return planned


def main() -> None:
    args = _arguments()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    amounts = Amounts(batches=args.batches, items=args.items)
    done: list[Round] = []
    begun = time.monotonic()
    systems = plan(args.rounds, args.seed, only=args.only, system=args.system)
    if not any(systems.values()):
        sys.exit("nothing to do: no scenario fits, or there is no such system")
    for (database, broker), planned in systems.items():
        if not planned:
            continue
        with tempfile.TemporaryDirectory(prefix="visq-faults-") as folder:
            if args.keep:
                folder = args.keep / f"{database}-{broker}"
            with Arena(System(Path(folder), database, broker)) as arena:
                for scenario, seed in planned:
                    found = arena.round(scenario, args.round_seed or seed, amounts)
                    done.append(found)
                    _tell(found)
                    if args.report:
                        with args.report.open("a") as lines:
                            lines.write(json.dumps(asdict(found)) + "\n")
    table = as_table([asdict(each) for each in done])
    print(f"\n{table}\n")
    if args.table:
        args.table.write_text(f"{table}\n")
    total = sum(each.jobs for each in done)
    broken = [each for each in done if each.violations]
    print(
        f"{len(done)} rounds, {total} jobs, {time.monotonic() - begun:.0f} s: "
        f"{sum(len(each.violations) for each in broken)} violations in {len(broken)} rounds; "
        f"the fault has not struck in {sum(each.struck == 0 for each in done)} rounds"
    )
    sys.exit(1 if broken else 0)


def _tell(found: Round) -> None:
    verdict = "ok" if not found.violations else f"{len(found.violations)} VIOLATIONS"
    if not found.struck:
        verdict += ", NOT STRUCK"
    print(
        f"[{found.system}; seed {found.seed}] {found.scenario}: {found.did}; {found.jobs} jobs, "
        f"attempts {found.attempts}, {found.seconds} s: {verdict}",
        flush=True,
    )
    for each in found.violations[:10]:
        print(f"    {each}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="on all systems together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round-seed", type=int, help="of every round, to repeat one")
    parser.add_argument("--batches", type=int, default=Amounts.batches)
    parser.add_argument("--items", type=int, default=Amounts.items, help="of each batch")
    parser.add_argument("--only", default="", help="scenarios with these words in their names")
    parser.add_argument(
        "--system", default="", help="only this one of the three, such as postgresql,redis"
    )
    parser.add_argument(
        "--report", type=Path, help="a file that gets a line of JSON for each round"
    )
    parser.add_argument("--table", type=Path, help="a file that gets the table of all rounds")
    parser.add_argument("--keep", type=Path, help="keep logs and data in this folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
