"""Faults of processes: killed, asked to end, stopped, and killed at a point."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from tests.faults.system import LEASE_SECONDS, System
from visq.points import Point

Run = Callable[[System, random.Random], str]
"""Breaks something by seeded chance, and returns what it did."""


def kill_workers(system: System, chance: random.Random) -> str:
    """kill -9 of a worker, and of another one a moment later."""
    victims = chance.sample(system.workers, 2)
    for worker in victims:
        worker.kill()
        system.wait(chance.uniform(0.1, 1.5))
    return f"killed {' and '.join(each.name for each in victims)}"


def kill_engines(system: System, chance: random.Random) -> str:
    struck = 0
    for worker in chance.sample(system.workers, 2):
        if (engine := worker.engine()) is not None:
            engine.kill()
            struck += 1
        system.wait(chance.uniform(0.2, 1.0))
    return f"killed {struck} engines"


def hang_an_engine(system: System, chance: random.Random) -> str:
    """SIGSTOP: the watchdog must find it."""
    worker = chance.choice(system.workers)
    engine = worker.engine()
    if engine is None:
        return "no engine to stop"
    engine.suspend()
    system.wait_for(lambda: not engine.is_running(), 20)
    return f"stopped the engine of {worker.name}"


def kill_apis(system: System, chance: random.Random) -> str:
    for api in chance.sample(system.apis, 2):
        api.kill()
        system.wait(chance.uniform(0.3, 1.5))
    return "killed both APIs, one after the other"


def kill_everything(system: System, chance: random.Random) -> str:
    for each in system.processes:
        each.kill()
    return "killed all processes at once"


def terminate_workers_in_turn(system: System, chance: random.Random) -> str:
    """A rolling restart with a grace that is too short for the long jobs."""
    for worker in system.workers:
        worker.terminate()
        system.wait_for(lambda worker=worker: not worker.alive, 20)
        system.wait(chance.uniform(0.5, 1.0))
    return "SIGTERM to one worker after the other"


def terminate_everything(system: System, chance: random.Random) -> str:
    for each in system.processes:
        each.terminate()
    system.wait_for(lambda: all(each.alive for each in system.processes), 30)
    return "SIGTERM to all processes at once"


def stop_a_worker_past_its_lease(system: System, chance: random.Random) -> str:
    """It comes back just before it writes its ends, when others have its jobs."""
    worker = chance.choice(system.workers)
    worker.arm("run.answered", chance.randint(1, 6), "stop")
    if not system.wait_for(lambda: worker.stopped, 5):
        worker.disarm()
        worker.stop()
    system.wait(LEASE_SECONDS + chance.uniform(0.4, 2.0))
    worker.go_on()
    return f"stopped {worker.name} for longer than its lease"


def at_point(point: Point, *kinds: str) -> Run:
    def kill_at_point(system: System, chance: random.Random) -> str:
        victims = [each for each in system.processes if each.kind in kinds]
        starts = {victim.name: victim.starts for victim in victims}
        for victim in victims:
            victim.arm(point, chance.randint(1, 5))

        def struck() -> int:
            return sum(victim.starts > starts[victim.name] for victim in victims)

        system.wait_for(lambda: struck() == len(victims), 4)
        for victim in victims:
            victim.disarm()
        return f"killed {struck()} of {len(victims)} at {point}"

    return kill_at_point


POINTS_OF_WORKERS: Final[tuple[Point, ...]] = (
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
POINTS_OF_APIS: Final[tuple[Point, ...]] = (
    "submit.accepted",
    "submit.answering",
    "transaction.committing",
    "transaction.committed",
    "jobs.published",
)


def kill_after_a_rescue(system: System, chance: random.Random) -> str:
    """A worker dies; whoever takes its jobs dies before it has published what follows."""
    for each in system.processes:
        each.arm("jobs.moved", 1)
    system.workers[0].kill()
    starts = sum(each.starts for each in system.processes)
    system.wait_for(lambda: sum(p.starts for p in system.processes) >= starts + 2, 8)
    return "killed whoever rescued the jobs of a killed worker"
