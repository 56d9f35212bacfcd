"""How long visq takes to recover: ``python -m tests.faults.recovery``.

- From kill -9 of a worker until its jobs run elsewhere.
- From the moment at which a killed server answers again until jobs end at the full rate: the first
  second in which at least 90 % of the mean before the kill have ended, counted from its beginning.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from sqlalchemy import func, select

from models.tables import Job, JobEvent
from tests.deployment import API_KEY
from tests.faults.rounds import Arena
from tests.faults.system import BrokerKind, System
from tests.waiting import until
from visq import Client
from visq.errors import Unavailable
from visq.types import JobStatus

SAMPLE_SECONDS = 0.1
STEADY_SECONDS = 6.0
FULL = 0.9


def after_a_workers_death(arena: Arena, jobs: int = 12) -> list[float]:
    """Seconds from the kill until each of the worker's jobs runs elsewhere."""
    with Client(arena.system.urls[1], API_KEY) as client:
        ids = [
            client.jobs.submit(f"job {n}", gen_config={"max_new_tokens": 2000}).id
            for n in range(jobs)
        ]
        running = select(func.count()).where(Job.id.in_(ids), Job.status == JobStatus.RUNNING)
        until(lambda: arena.system.ask(lambda s: s.scalar(running)) == jobs, 60, "all runs")
        victim = arena.system.workers[1]
        mine = select(Job.id).where(Job.id.in_(ids), Job.worker.contains(f":{victim.pid}:"))
        held = arena.system.ask(lambda s: s.scalars(mine).all())
        killed = time.time()
        victim.kill()
        again = select(JobEvent.at).where(
            JobEvent.job_id.in_(held),
            JobEvent.to_status == JobStatus.RUNNING,
            JobEvent.attempt == 2,
        )
        arena.system.wait_for(
            lambda: len(arena.system.ask(lambda s: s.scalars(again).all())) == len(held), 120
        )
        times = arena.system.ask(lambda s: s.scalars(again).all())
        for job_id in ids:
            client.jobs.cancel(job_id)
        arena.system.wait_for(lambda: arena.unfinished("job_") == 0, 60)
    return [at.timestamp() - killed for at in times]


def after_a_restart(arena: Arena, restart: Callable[[], None], items: int) -> tuple[float, float]:
    """(jobs a second before, seconds until as many end again)."""
    with Client(arena.system.urls[1], API_KEY) as client:
        bodies = [
            {"prompt": f"item {n}", "gen_config": {"max_new_tokens": 2}} for n in range(items)
        ]
        for start in range(0, items, 500):
            client.batches.submit(bodies[start : start + 500])
        samples = _Samples(arena)
        samples.take(2.0)
        before = samples.take(STEADY_SECONDS)
        restart()
        back = time.monotonic()
        seconds = samples.until_rate(FULL * before, back, 60.0)
        for batch in client.batches.list():
            client.batches.cancel(batch.id)
        arena.system.wait_for(lambda: arena.unfinished("job_") == 0, 120)
    return before, seconds


class _Samples:
    """How many jobs had ended, and when."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._at: list[float] = []
        self._ended: list[int] = []

    def take(self, seconds: float) -> float:
        """Sample for so long; jobs a second meanwhile."""
        first = len(self._at)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._one()
        span = self._at[-1] - self._at[first]
        return (self._ended[-1] - self._ended[first]) / span

    def until_rate(self, rate: float, since: float, most: float) -> float:
        while time.monotonic() - since < most:
            self._one()
            begin = self._at[-1] - 1.0
            if begin < since:
                continue
            earlier = bisect(self._at, begin) - 1
            if self._ended[-1] - self._ended[earlier] >= rate:
                return begin - since
        raise SystemExit(f"the rate did not come back within {most:g} s")

    def _one(self) -> None:
        self._arena.system.wait(SAMPLE_SECONDS)
        ended = select(func.count()).where(Job.finished_at.is_not(None))
        with suppress(Unavailable):
            count = self._arena.system.reader.read(lambda session: session.scalar(ended))
            self._at.append(time.monotonic())
            self._ended.append(count or 0)


def main() -> None:
    args = _arguments()
    for lease, heartbeat in ((3, 0.5), (30, 5)):
        found: list[float] = []
        with _arena("redis", lease_seconds=str(lease), heartbeat_seconds=str(heartbeat)) as arena:
            for _ in range(args.times if lease < 10 else 3):
                found += after_a_workers_death(arena)
        _tell(f"kill -9 of a worker, lease {lease} s: job runs elsewhere", found)
    brokers: Sequence[BrokerKind] = ("redis", "rabbitmq")
    for broker in brokers:
        with _arena(broker) as arena:
            system = arena.system
            server = system.valkey if system.rabbitmq is None else system.rabbitmq
            assert system.postgres is not None
            for name, victim in ((broker, server), ("postgresql", system.postgres)):
                if broker == "rabbitmq" and name == "postgresql":
                    continue

                def restart(victim: object = victim) -> None:
                    victim.kill()  # type: ignore[attr-defined]
                    victim.start()  # type: ignore[attr-defined]

                results = [after_a_restart(arena, restart, args.items) for _ in range(args.times)]
                before = statistics.median(rate for rate, _ in results)
                _tell(
                    f"{name} killed and restarted, {before:.0f} jobs/s before: full rate",
                    [seconds for _, seconds in results],
                )


def _arena(broker: BrokerKind, **settings: str) -> Arena:
    folder = Path(tempfile.mkdtemp(prefix="visq-recovery-"))
    system = System(folder, "postgresql", broker, **{"maintenance_seconds": "1"} | settings)
    return Arena(system)


def _tell(what: str, seconds: Sequence[float]) -> None:
    print(
        f"{what} after {statistics.median(seconds):.1f} s (lowest {min(seconds):.1f}, highest "
        f"{max(seconds):.1f}, of {len(seconds)})",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--items", type=int, default=6000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
