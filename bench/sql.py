"""What a job costs a worker in SQL: ``python -m bench.sql [--against OTHER_CHECKOUT]``.

Claims jobs, ends them and deletes their outbox entries, as a worker does, in one thread on an
SQLite file of its own. What counts is the processor time of that thread: on SQLite a process has
one writer, so the transactions of all its runs stand in one line. "In groups" does it for 16 jobs
in one transaction (`models.groups`), as a busy worker does. With ``--against``, rounds of this tree
and of the other one alternate.

It is not a benchmark of a database: nobody else uses it, and nothing waits for a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tests.models.conftest import World

R = TypeVar("R")
Costs = dict[str, list[float]]
"""By kind of job: milliseconds a job in each of `STEPS`."""

STEPS = ("claim", "finish", "delete")
WARM_UP = 32
"""Jobs before each measurement: connections and SQLAlchemy's caches."""
GROUP = 16


def main() -> None:
    args = _arguments()
    if args.measure:
        print(json.dumps(measure(args.jobs)))
        return
    trees = {"this tree": Path(__file__).parents[1]}
    if args.against is not None:
        trees = {"the other": args.against, **trees}
    rounds: dict[str, list[Costs]] = {name: [] for name in trees}
    print(f"{args.jobs} jobs, {args.rounds} rounds, load average {os.getloadavg()[0]:.1f}")
    for _ in range(args.rounds):
        for name, tree in trees.items():
            rounds[name].append(_measured_in(tree, args.jobs))
    _report(rounds)


def measure(jobs: int) -> Costs:
    """Milliseconds of processor time a job."""
    from migrations import run as migrations
    from models import reading
    from models.database import Database
    from tests.models.conftest import World

    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/visq.db"
        migrations.upgrade(url)
        database = Database(url)
        world = World(database, database.run(reading.ensure_tenants, ["bench"])["bench"])
        alone = [world.submit().id for _ in range(WARM_UP + jobs)]
        turns = [_second_turn(world) for _ in range(WARM_UP + jobs)]
        batch_id = world.submit_batch(WARM_UP + jobs)
        items = database.read(reading.list_jobs, batch_id=batch_id, limit=WARM_UP + jobs)
        costs = {
            "alone": _run(world, alone),
            "second turn of a session": _run(world, turns),
            "item of a batch": _run(world, [job.id for job in items]),
        }
        if find_spec("models.groups") is not None:
            grouped = {"alone": [world.submit().id for _ in range(WARM_UP + jobs)]}
            grouped["second turn of a session"] = [
                _second_turn(world) for _ in range(WARM_UP + jobs)
            ]
            batch_id = world.submit_batch(WARM_UP + jobs)
            items = database.read(reading.list_jobs, batch_id=batch_id, limit=WARM_UP + jobs)
            grouped["item of a batch"] = [job.id for job in items]
            for kind, job_ids in grouped.items():
                costs[f"{kind}, in groups"] = _run_in_groups(world, job_ids)
        database.close()
    return costs


def _second_turn(world: World) -> str:
    """Id of a turn that has a history of one."""
    first = world.submit(session={})
    world.succeed(first.id)
    return world.submit(session_id=first.session_id).id


def _run(world: World, job_ids: Sequence[str]) -> list[float]:
    from models import outbox
    from tests.models.conftest import answered

    total = [0.0] * len(STEPS)
    for number, job_id in enumerate(job_ids):
        if number == WARM_UP:
            total = [0.0] * len(STEPS)
        work = _timed(total, 0, partial(world.claimed, job_id))
        ended = _timed(total, 1, partial(world.finish, work, answered(work, "a cat")))
        assert ended is not None
        entries = [event.id for event in ended.events]
        _timed(total, 2, partial(world.database.run, outbox.done, entries))
    return [1000 * seconds / (len(job_ids) - WARM_UP) for seconds in total]


def _run_in_groups(world: World, job_ids: Sequence[str]) -> list[float]:
    from models import groups, outbox
    from tests.models.conftest import answered

    run = world.database.run
    total = [0.0] * len(STEPS)
    for start in range(0, len(job_ids), GROUP):
        if start == WARM_UP:
            total = [0.0] * len(STEPS)
        group = job_ids[start : start + GROUP]
        claim_all = partial(run, groups.claim_all, group, worker="w", lease_seconds=30.0)
        works = [work for work in _timed(total, 0, claim_all).values() if work is not None]
        ends = [(work.claim, answered(work, "a cat")) for work in works]
        ended = _timed(total, 1, partial(run, groups.succeed_all, ends)).values()
        entries = [event.id for each in ended if each is not None for event in each.events]
        assert len(entries) == len(group)
        _timed(total, 2, partial(run, outbox.done, entries))
    return [1000 * seconds / (len(job_ids) - WARM_UP) for seconds in total]


def _timed(total: list[float], step: int, call: Callable[[], R]) -> R:
    start = time.thread_time()
    result = call()
    total[step] += time.thread_time() - start
    return result


def _measured_in(tree: Path, jobs: int) -> Costs:
    """In a process of its own, which imports from `tree` (-P: and not from this folder)."""
    command = [sys.executable, "-P", __file__, "--measure", "--jobs", str(jobs)]
    environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    costs: Costs = json.loads(done.stdout)
    return costs


def _report(rounds: dict[str, list[Costs]]) -> None:
    print("\nms of processor time a job: median of the rounds (lowest - highest)\n")
    print("| kind of job | tree |", " | ".join(STEPS), "|")
    print("| --- | --- |", " | ".join("---" for _ in STEPS), "|")
    for kind in next(reversed(rounds.values()))[0]:
        for name, measured in rounds.items():
            if kind not in measured[0]:
                continue  # the other tree has no groups
            steps = zip(*(costs[kind] for costs in measured), strict=True)
            cells = [
                f"{statistics.median(step):.2f} ({min(step):.2f} - {max(step):.2f})"
                for step in steps
            ]
            print(f"| {kind} | {name} |", " | ".join(cells), "|")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=200, help="of each kind, in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of visq, to compare with")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
