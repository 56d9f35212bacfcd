"""The protocol holds whatever clients, workers and loops do, and in whatever order.

The default run is short and always the same. ``FAULT_STEPS=10000`` runs at least so many random
steps on each database, and prints its seeds; ``FAULT_SEED`` repeats one. An example that fails is
printed as it was found; with ``FAULT_SHRINK=1`` it is made shorter first, which takes minutes.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import select
from sqlalchemy.orm import Session

from migrations import run as migrations
from models import jobs, leases, reading
from models.database import Database
from models.tables import Job, JobEvent
from tests.models.conftest import PERMANENT, World
from tests.models.protocol import Protocol

STEPS = int(os.environ.get("FAULT_STEPS", "0"))
SHRINK = bool(os.environ.get("FAULT_SHRINK"))
EXAMPLES = {"sqlite": 6, "postgresql": 3}
"""Of the short run."""

EXAMPLE_STEPS = 120
COMMON = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate, *([Phase.shrink] if SHRINK else [])],
    print_blob=False,
    report_multiple_bugs=False,
    stateful_step_count=EXAMPLE_STEPS,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def machine(database_url: str) -> Iterator[type[Protocol]]:
    """The machine on a migrated database of its own."""
    migrations.upgrade(database_url)
    database = Database(database_url)

    class Bound(Protocol):
        pass

    Bound.database = database
    Bound.tenant_id = database.run(reading.ensure_tenants, ["acme"])["acme"]
    yield Bound
    database.close()


def test_a_run_that_lost_its_job_does_not_renew_the_lease_of_the_run_that_has_it(
    world: World,
) -> None:
    job = world.submit()
    old = world.claimed(job.id, lease_seconds=-1)
    world.database.run(leases.rescue, job.id, backoff_seconds=0.0)
    world.claimed(job.id, lease_seconds=-1)  # this worker dies, too
    world.database.run(jobs.renew, [old.claim], lease_seconds=3600.0)
    assert world.database.read(leases.without_lease, 10) == [job.id]


def test_each_retry_gives_a_job_the_time_that_it_was_given_at_first(world: World) -> None:
    job = world.submit(expires_in=100.0)

    def an_hour_passes(session: Session) -> None:
        hour = timedelta(hours=1)
        row = session.get_one(Job, job.id)
        row.created_at -= hour
        row.expires_at = None if row.expires_at is None else row.expires_at - hour
        for event in session.scalars(select(JobEvent).where(JobEvent.job_id == job.id)):
            event.at -= hour

    for _ in range(2):
        world.finish(world.claimed(job.id), PERMANENT)
        world.database.run(an_hour_passes)
        world.database.run(jobs.retry, job.id)
    left = world.claimed(job.id).expires_in
    assert left == pytest.approx(100.0, abs=30)


@pytest.mark.skipif(STEPS > 0, reason="FAULT_STEPS asks for the long run")
def test_no_order_of_steps_and_faults_breaks_a_promise(machine: type[Protocol]) -> None:
    kind = machine.database.engine.dialect.name
    short = settings(COMMON, max_examples=EXAMPLES[kind], derandomize=True)
    run_state_machine_as_test(machine, settings=short)
    assert machine.steps > 100


@pytest.mark.skipif(STEPS == 0, reason="FAULT_STEPS says how many steps")
@pytest.mark.timeout(0)
def test_no_order_of_many_random_steps_breaks_a_promise(
    machine: type[Protocol], capsys: pytest.CaptureFixture[str]
) -> None:
    first = int(os.environ.get("FAULT_SEED", random.randrange(2**32)))
    began = time.monotonic()
    long = settings(COMMON, max_examples=20)
    rounds = 0
    while machine.steps < STEPS:
        with capsys.disabled():
            print(f"\nFAULT_SEED={first + rounds}", end="", flush=True)
        run_state_machine_as_test(seed(first + rounds)(machine), settings=long)
        rounds += 1
    kind = machine.database.engine.dialect.name
    seconds = time.monotonic() - began
    with capsys.disabled():
        print(f"\n{kind}: {machine.steps} steps, {machine.jobs_seen} jobs, {seconds:.0f} s")
