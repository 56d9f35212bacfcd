"""Whether a million finished jobs slow down what runs all the time: ``python -m bench.full_table``.

On private databases, PostgreSQL and SQLite: first with some hundred live jobs, then with the same
and ``--jobs`` that have ended. Those have lived: each row was queued, running and ended, so what
its indexes keep of that is there too, before and after a VACUUM. Each statement is the one of
``models``, in its own transaction, by one client; wall time. With ``--write``, the table goes to
``bench/results/full-table.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.full_table_rows import Rows
from bench.results_files import RESULTS, Table, conditions, described
from migrations import run as migrations
from models import (
    batch_holds,
    batch_windows,
    batches,
    checkup,
    dead_letters,
    dispatch,
    groups,
    jobs,
    leases,
    outbox,
    reading,
)
from models.connections import MIGRATING
from models.database import Database
from models.outcomes import Work
from tests.models.conftest import World, answered
from tests.servers import PostgreSQL

CALLS: Final = 300
"""Of each statement; p99 is the third slowest of them."""
WARM_UP: Final = 20
GROUP: Final = 16
HELD: Final = 4_000
"""Items that wait for their turn in each open batch."""
EQUAL: Final = 20_000
"""Ended items that ask for the same as those that wait."""
LARGE: Final = 50_000
"""Ended items of each batch that is still open."""
MOST_SECONDS: Final = 20.0
"""Of all calls of one statement: a slow one has fewer of them."""
MOST_MS: Final = 10.0
"""p99 of a claim (research/jobs.md, F20)."""


@dataclass
class Live:
    """What is there to do, on each of the tables."""

    world: World
    single: list[str]
    grouped: list[str]
    open: str
    equal: str
    """An open batch whose items all ask for the same."""
    cancelling: str


def live_in(database: Database) -> Live:
    """Submit what the statements meet."""
    world = World(database, database.run(reading.ensure_tenants, ["bench"])["bench"])
    for _ in range(20):
        first = world.submit(session={})
        world.submit(session_id=first.session_id)  # waits
        world.claimed(world.submit(expires_in=3600).id, lease_seconds=3600.0)
    single = [world.submit().id for _ in range(WARM_UP + CALLS)]
    groups_of = world.submit_batch(GROUP * (WARM_UP + CALLS))
    equal = [{"custom_id": f"{n}", "prompt": "the same"} for n in range(HELD)]
    cancelling = world.submit_batch(GROUP)
    for job in database.read(reading.list_jobs, batch_id=cancelling, limit=GROUP):
        world.claimed(job.id, lease_seconds=3600.0)
    database.run(batches.request_cancel, cancelling)
    for job_id in database.read(batches.to_cancel, GROUP):
        database.run(jobs.cancel, job_id)
    items = database.read(reading.list_jobs, batch_id=groups_of, limit=GROUP * (WARM_UP + CALLS))
    return Live(
        world,
        single,
        [job.id for job in items],
        world.submit_batch(HELD),
        world.submit_batch(HELD, items=equal, dedupe=True),
        cancelling,
    )


Measured = dict[str, tuple[float, float]]
"""Median and p99 by statement, in milliseconds."""


def measure(live: Live) -> Measured:
    """Call each statement; what a claim takes, a later statement ends."""
    database = live.world.database
    claimed: list[Work] = []
    in_groups: list[list[Work]] = []
    single, grouped = iter(live.single), iter(live.grouped)
    in_flight = _numbers(0)

    def claim() -> None:
        claimed.append(live.world.claimed(next(single), lease_seconds=3600.0))

    def claim_all() -> None:
        ids = [next(grouped) for _ in range(GROUP)]
        works = database.run(groups.claim_all, ids, worker="w", lease_seconds=3600.0)
        in_groups.append([work for work in works.values() if work is not None])

    def finish() -> None:
        work = claimed.pop()
        assert live.world.finish(work, answered(work, "a cat")) is not None

    def succeed_all() -> None:
        ends = [(work.claim, answered(work, "a cat")) for work in in_groups.pop()]
        assert len(database.run(groups.succeed_all, ends)) == GROUP

    def renew() -> None:
        held = [work.claim for work in claimed[-GROUP:]]
        assert len(database.run(jobs.renew, held, lease_seconds=3600.0)) == GROUP

    def fill() -> None:
        database.run(batch_windows.fill_windows, 2_000 + GROUP * next(in_flight))

    def equal_items() -> None:
        values = {"batch_id": live.equal, "free": GROUP}
        database.read(lambda s: s.scalars(batch_windows._NEXT_HELD_ONCE, values).all())

    def of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], object]:
        return partial(database.run, function, *args, **kwargs)

    statements: dict[str, Callable[[], object]] = {
        "claim": claim,
        "claim of a job that is not there to take": of(
            jobs.claim, live.single[0], worker="w", lease_seconds=30.0
        ),
        f"claim of {GROUP} in a group": claim_all,
        f"renew {GROUP} leases": renew,
        "a worker's claims (`claims_of`)": of(jobs.claims_of, "worker-9"),
        "end of a run (`finish`)": finish,
        f"ends of {GROUP} in a group": succeed_all,
        "`past_deadline`": of(jobs.past_deadline, 200),
        "`without_lease`": of(leases.without_lease, 200),
        "`to_cancel`": of(batches.to_cancel, 200),
        "`reserve_due`, 16 at a time": of(dispatch.reserve_due, limit=16, republish_seconds=0.0),
        "`in_broker`": of(dispatch.in_broker),
        "`fill_windows`, full": of(batch_windows.fill_windows, 0),
        f"`fill_windows`, {GROUP} at a time": fill,
        f"its next {GROUP} items with `dedupe`": equal_items,
        "`outbox.reserve`, one at a time": of(outbox.reserve, 1),
        "`batch_holds.is_any_to_do`": of(batch_holds.is_any_to_do),
        "dead letters: count": of(dead_letters.count),
        "dead letters: by error": of(dead_letters.count_by_error),
        "dead letters: a page of 50": of(dead_letters.page, limit=50),
        "`visq doctor`": of(checkup.look, late_seconds=30.0, untold_seconds=30.0),
    }
    found = {}
    for name, call in statements.items():
        found[name] = _timed(call)
    return found


def _numbers(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    taken = []
    over = time.perf_counter() + MOST_SECONDS
    for number in range(WARM_UP + CALLS):
        if taken and time.perf_counter() > over:
            break
        begun = time.perf_counter()
        call()
        if number >= WARM_UP:
            taken.append(1000 * (time.perf_counter() - begun))
    taken.sort()
    return statistics.median(taken), taken[-max(1, len(taken) // 100)]


def on(url: str, count: int) -> dict[str, Measured]:
    """By the state of the table: with `count` jobs that have ended."""
    migrations.upgrade(url)
    database = Database(url, limits=MIGRATING)  # filling and VACUUM take their time
    try:
        rows = Rows(database)
        begun = time.monotonic()
        if count:
            rows.fill(count)
        found: dict[str, Measured] = {}
        states = (f"{count:,} ended", "the same, after VACUUM") if count else ("live jobs only",)
        if database.engine.dialect.name == "sqlite":
            states = states[:1]  # an UPDATE leaves nothing dead behind
        for state in states:
            live = live_in(database)
            if count:
                rows.end_more_of(live.open, LARGE)
                rows.end_more_of(live.cancelling, LARGE)
                rows.end_more_of(live.equal, EQUAL, like=_its_key(database, live.equal))
            rows.analyze(vacuum=state.endswith("VACUUM"))
            print(f"{state}: ready after {time.monotonic() - begun:.0f} s", flush=True)
            found[state] = measure(live)
            print(_table(found), flush=True)
            rows.end_all()  # else the next measurement finds it
        return found
    finally:
        database.close()


def _its_key(database: Database, batch_id: str) -> str:
    """`dedupe_key` of its items, which is one."""
    [job] = database.read(reading.list_jobs, batch_id=batch_id, limit=1)
    assert job.dedupe_key is not None
    return job.dedupe_key


def main() -> None:
    args = _arguments()
    where = conditions()
    found: dict[str, dict[str, Measured]] = {}
    with tempfile.TemporaryDirectory(prefix="visq-full-") as folder:
        if "postgresql" in args.on:
            with PostgreSQL(Path(folder) / "postgres") as server:
                found["PostgreSQL"] = _on_both(server.create_database, args.jobs)
        if "sqlite" in args.on:
            files = (f"sqlite:///{folder}/{n}.db" for n in range(2))
            found["SQLite"] = _on_both(lambda: next(files), args.jobs)
    tables = "\n\n".join(f"## {name}\n\n{_table(each)}" for name, each in found.items())
    text = (
        f"# What {args.jobs:,} ended jobs cost\n\n`python -m bench.full_table`: {described(where)}"
    )
    print(f"\n{tables}")
    if args.write:
        (RESULTS / "full-table.md").write_text(f"{text}\n\n{tables}\n")
    late = [name for name, each in found.items() if _slowest_claim(each) > MOST_MS]
    sys.exit(f"a claim takes more than {MOST_MS:g} ms on {', '.join(late)}" if late else 0)


def _on_both(new_database: Callable[[], str], count: int) -> dict[str, Measured]:
    return on(new_database(), 0) | on(new_database(), count)


def _table(found: dict[str, Measured]) -> Table:
    names = list(next(iter(found.values())))
    return Table(
        ["ms: median / p99", *found],
        [
            [name, *(f"{each[name][0]:.1f} / {each[name][1]:.1f}" for each in found.values())]
            for name in names
        ],
    )


def _slowest_claim(found: dict[str, Measured]) -> float:
    return max(each["claim"][1] for each in found.values())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1_000_000, help="a multiple of 1,000")
    parser.add_argument("--on", nargs="+", default=["postgresql", "sqlite"])
    parser.add_argument("--write", action="store_true", help="into bench/results/full-table.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
