"""The rounds bite: with a mechanism taken out, they find what it prevents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.load import Amounts
from tests.faults.mutations import MUTATIONS
from tests.faults.rounds import Arena
from tests.faults.scenarios import SCENARIOS
from tests.faults.system import System

LONG = Amounts(
    jobs=80,
    sessions=0,
    deleted=0,
    batches=0,
    doomed=0,
    files=0,
    cancels=0,
    expiring=0,
    missing=0,
    steps=60,
    long=2,
    seconds=2.0,
)
"""Answers of one second or two: they are under way when something happens."""
CASES = {
    "fencing": ("a worker stands still past its lease", "wrong answer"),
    "outbox": ("kill -9 of workers at run.ended", "untold"),
    "lease": ("no fault", "blamed"),
    "clock": ("clocks 5 minutes off", "blamed"),
}
ROUNDS = 4
"""At most: whether a fault strikes where it hurts is left to chance."""

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_promise_that_is_broken_is_found(servers_dir: Path, mutation: str) -> None:
    name, kind = CASES[mutation]
    [scenario] = [each for each in SCENARIOS if each.name == name]
    found: list[str] = []
    system = System(servers_dir / f"without-{mutation}", "sqlite", mutation=mutation)
    with Arena(system) as arena:
        for seed in range(ROUNDS):
            played = arena.round(scenario, seed, LONG, end_seconds=20, told_seconds=8)
            found = played.violations
            if found:
                break
    assert any(each.startswith(f"{kind}: ") for each in found), found
