"""Faults of processes: killed, asked to end, stopped, and struck at a point.

A scenario returns how often it struck, and what it did in words: 0 if it found nothing to break.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from tests.faults.process import Deed
from tests.faults.system import LEASE_SECONDS, Process, System
from visq.points import Point

Run = Callable[[System, random.Random], tuple[int, str]]
"""Breaks something by seeded chance; returns how often it struck, and what it did."""


def kill_workers(system: System, chance: random.Random) -> tuple[int, str]:
    """kill -9 of a worker, and of another one a moment later."""
    victims = chance.sample(system.workers, 2)
    for worker in victims:
        worker.kill()
        system.wait(chance.uniform(0.1, 1.5))
    return len(victims), f"killed {' and '.join(each.name for each in victims)}"


def kill_engines(system: System, chance: random.Random) -> tuple[int, str]:
    struck = 0
    for worker in chance.sample(system.workers, 2):
        system.wait_for(lambda worker=worker: worker.engine() is not None, 5)
        if (engine := worker.engine()) is not None:
            engine.kill()
            struck += 1
        system.wait(chance.uniform(0.2, 1.0))
    return struck, f"killed {struck} engines"


def hang_an_engine(system: System, chance: random.Random) -> tuple[int, str]:
    """SIGSTOP: the watchdog must find it."""
    worker = chance.choice(system.workers)
    system.wait_for(lambda: worker.engine() is not None and system.held_by(worker) > 0, 5)
    engine = worker.engine()
    if engine is None:
        return 0, "no engine to stop"
    engine.suspend()
    found = system.wait_for(lambda: not engine.is_running(), 20)
    return int(found), f"stopped the engine of {worker.name}"


def kill_apis(system: System, chance: random.Random) -> tuple[int, str]:
    for api in chance.sample(system.apis, 2):
        api.kill()
        system.wait(chance.uniform(0.3, 1.5))
    return 2, "killed both APIs, one after the other"


def kill_everything(system: System, chance: random.Random) -> tuple[int, str]:
    for each in system.processes:
        each.kill()
    return len(system.processes), "killed all processes at once"


def terminate_workers_in_turn(system: System, chance: random.Random) -> tuple[int, str]:
    """A rolling restart with a grace that is too short for the long jobs."""
    for worker in system.workers:
        worker.terminate()
        system.wait_for(_started_again([worker]), 20)
        system.wait(chance.uniform(0.5, 1.0))
    return len(system.workers), "SIGTERM to one worker after the other"


def terminate_everything(system: System, chance: random.Random) -> tuple[int, str]:
    again = _started_again(system.processes)
    for each in system.processes:
        each.terminate()
    ended = system.wait_for(again, 30)
    how = "at once" if ended else "at once, and not all of them have ended"
    return len(system.processes) if ended else 0, f"SIGTERM to all processes {how}"


def _started_again(processes: Sequence[Process]) -> Callable[[], bool]:
    """Whether all of them have ended, and were started anew, since now."""
    before = {each.name: each.starts for each in processes}
    return lambda: all(each.starts > before[each.name] for each in processes)


def stop_a_worker_past_its_lease(system: System, chance: random.Random) -> tuple[int, str]:
    """It comes back just before it writes its ends, when others have its jobs."""
    worker = chance.choice(system.workers)
    worker.arm("run.answered", chance.randint(1, 6), "stop")
    if not system.wait_for(lambda: worker.stopped, 5):
        worker.disarm()
        worker.stop()
    held = system.held_by(worker)
    system.wait(LEASE_SECONDS + chance.uniform(0.4, 2.0))
    worker.go_on()
    return held, f"stopped {worker.name}, which had {held} jobs, for longer than its lease"


@contextmanager
def standing_still(processes: Sequence[Process]) -> Iterator[None]:
    """Stop them for a while."""
    for each in processes:
        each.stop()
    try:
        yield
    finally:
        for each in processes:
            each.go_on()


def at_point(
    point: Point,
    kind: str,
    deed: Deed = "kill",
    *,
    passes: int = 5,
    alone: bool = False,
    delay: float = 0.0,
    before: Callable[[System], object] = lambda _: None,
) -> Run:
    """Strike processes where they come by `point`.

    :param passes: for which time at most.
    :param alone: the processes of the other kind are dead meanwhile: else they might do all that
        leads there.
    :param delay: seconds between `before` and the arming.
    :param before: what makes sure that somebody comes by.
    """

    def strike(system: System, chance: random.Random) -> tuple[int, str]:
        before(system)
        victims = [each for each in system.processes if each.kind == kind]
        others = [each for each in system.processes if each.kind != kind]
        with system.without(others if alone else ()):
            system.wait(delay)
            for victim in victims:
                victim.arm(point, chance.randint(1, passes), deed)
            # One that comes by is enough, but others have a moment too.
            if not system.wait_for(lambda: all(each.struck for each in victims), 4):
                system.wait_for(lambda: any(each.struck for each in victims), 10)
            struck = sum(each.struck for each in victims)
            for victim in victims:
                victim.disarm()
        done = "killed" if deed == "kill" else "SIGTERM to"
        return struck, f"{done} {struck} of {len(victims)} at {point}"

    return strike


def kill_a_busy_worker(system: System) -> None:
    """Its jobs must be rescued."""
    worker = system.workers[0]
    system.wait_for(lambda: system.held_by(worker) > 0, 5)
    worker.kill()


def keep_workers_busy(system: System) -> None:
    """All of them have jobs."""
    system.wait_for(lambda: all(system.held_by(worker) for worker in system.workers), 5)


def leave_events(system: System) -> None:
    """A worker dies between an end and its publication: the maintenance loops must do it."""
    worker = system.workers[-1]
    worker.arm("events.in_redis", 1)
    system.wait_for(lambda: worker.struck, 5)
    worker.disarm()


def leave_a_batch(kind: str, point: Point) -> Callable[[System], None]:
    """A process of that kind dies while it reads or writes for a batch: another one must go on."""

    def leave(system: System) -> None:
        victims = [each for each in system.processes if each.kind == kind]
        for victim in victims:
            victim.arm(point, 1)
        system.wait_for(lambda: any(each.struck for each in victims), 10)
        for victim in victims:
            victim.disarm()

    return leave


OF_WORKERS: Final[Sequence[Point]] = (
    "transaction.committing",
    "transaction.committed",
    "run.taken",
    "run.claimed",
    "run.shown",
    "run.answered",
    "run.ended",
    "run.delivered",
    "events.in_redis",
    "events.published",
    "jobs.reserved",
    "jobs.published",
)
OF_APIS: Final[Sequence[Point]] = (
    "submit.accepted",
    "submit.answering",
    "transaction.committing",
    "transaction.committed",
    "jobs.published",
)

OF_BATCHES: Final[Sequence[Point]] = (
    "batch.chunk_read",
    "batch.chunk_added",
    "batch.output_written",
)
OFTEN: Final[Sequence[tuple[str, Point]]] = (
    ("api", "batch.chunk_read"),
    ("api", "batch.chunk_added"),
)

JUST_BEFORE_A_RESCUE: Final = LEASE_SECONDS - 0.6
"""Seconds after the death of a worker, which has renewed its leases a heartbeat before at most."""

AT_POINTS: Final[dict[str, Run]] = {
    **{f"kill -9 of workers at {point}": at_point(point, "worker") for point in OF_WORKERS},
    "kill -9 of workers at jobs.moved": at_point(
        "jobs.moved",
        "worker",
        passes=1,
        alone=True,
        delay=JUST_BEFORE_A_RESCUE,
        before=kill_a_busy_worker,
    ),
    "kill -9 of workers at events.reserved": at_point(
        "events.reserved", "worker", passes=1, alone=True, before=leave_events
    ),
    **{f"kill -9 of APIs at {point}": at_point(point, "api") for point in OF_APIS},
    # By an API that cancels turns of a session that is deleted.
    "kill -9 of APIs at events.in_redis": at_point("events.in_redis", "api", passes=2),
    "kill -9 of APIs at events.published": at_point("events.published", "api", passes=2),
    "kill -9 of APIs at events.reserved": at_point(
        "events.reserved", "api", passes=1, alone=True, before=leave_events
    ),
    "kill -9 of APIs at jobs.reserved": at_point("jobs.reserved", "api", passes=1, alone=True),
    "kill -9 of APIs at jobs.moved": at_point(
        "jobs.moved",
        "api",
        passes=1,
        alone=True,
        delay=JUST_BEFORE_A_RESCUE,
        before=keep_workers_busy,
    ),
    # APIs that accept a batch read it at once: workers meet one that dead APIs have left.
    **{
        f"kill -9 of {kind}s at {point}".replace("apis", "APIs"): at_point(
            point, kind, passes=2, alone=True, before=leave_a_batch(other, point)
        )
        for point in OF_BATCHES
        for kind, other in (("worker", "api"), ("api", "worker"))
        if (kind, point) not in OFTEN
    },
    **{f"kill -9 of APIs at {point}": at_point(point, "api") for kind, point in OFTEN},
    "SIGTERM of workers at run.claimed": at_point("run.claimed", "worker", "terminate"),
    "SIGTERM of workers at run.answered": at_point("run.answered", "worker", "terminate"),
    "SIGTERM of workers at run.ended": at_point("run.ended", "worker", "terminate"),
    "SIGTERM of APIs at submit.accepted": at_point("submit.accepted", "api", "terminate"),
}
"""Scenarios by name."""
