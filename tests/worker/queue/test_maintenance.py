"""When the maintenance loop does which of its steps."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrations import run as migrations
from models import reading
from models.database import Database
from tests.models.conftest import World
from tests.waiting import until
from visq.settings import Settings
from worker.queue import Courier, Maintenance

STEPS = (
    "expire_jobs",
    "rescue_jobs",
    "cancel_batch_items",
    "fill_windows",
    "publish_jobs",
)


class Watched(Maintenance):
    """Only notes its steps."""

    def __init__(self, maintenance_seconds: float, folder: Path) -> None:
        settings = Settings(data=folder, maintenance_seconds=maintenance_seconds)
        super().__init__(
            settings, cast("Database", None), cast("Courier", SimpleNamespace(redis=None))
        )
        self.steps: list[str] = []
        """All but those of the events."""
        self.events = 0
        self.events_may_end = threading.Event()
        self.events_may_end.set()
        self.lock = threading.Lock()
        for name in STEPS:
            setattr(self, name, self._noting(name))

    def publish_events(self) -> None:
        self.events += 1
        assert self.events_may_end.wait(30)

    def _noting(self, name: str) -> Any:
        def step() -> None:
            with self.lock:
                self.steps.append(name)

        step.__name__ = name
        return step

    def taken(self) -> list[str]:
        with self.lock:
            steps, self.steps = self.steps, []
        return steps


def test_room_in_a_window_asks_for_the_windows_only_and_wake_for_all(tmp_path: Path) -> None:
    maintenance = Watched(3600, tmp_path)
    maintenance.start()
    until(lambda: len(maintenance.steps) == len(STEPS), 10, "the first round")
    assert maintenance.taken() == list(STEPS)
    maintenance.wake_for_windows()
    until(lambda: len(maintenance.steps) == 2, 10, "the windows")
    assert maintenance.taken() == ["fill_windows", "publish_jobs"]
    maintenance.wake()
    until(lambda: len(maintenance.steps) == len(STEPS), 10, "a whole round")
    assert maintenance.taken() == list(STEPS)
    maintenance.stop()


def test_whole_rounds_come_in_time_however_often_windows_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.maintenance.SHORTEST_PAUSE", 0.001)
    maintenance = Watched(0.05, tmp_path)
    maintenance.start()

    def woken_again() -> bool:
        maintenance.wake_for_windows()
        return maintenance.steps.count("rescue_jobs") > 3

    until(woken_again, 20, "whole rounds", every=0.001)
    maintenance.stop()


def test_events_that_take_their_time_hold_up_no_other_step(tmp_path: Path) -> None:
    maintenance = Watched(0.05, tmp_path)
    maintenance.events_may_end.clear()
    maintenance.start()
    until(lambda: maintenance.steps.count("rescue_jobs") > 3, 20, "rounds beside the events")
    assert maintenance.events == 1
    maintenance.events_may_end.set()
    until(lambda: maintenance.events > 2, 20, "more events")
    maintenance.stop()


def test_a_round_that_was_full_of_jobs_to_publish_is_followed_by_another_at_once(
    sqlite_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.maintenance.CHUNK", 4)
    monkeypatch.setattr("models.submit.PUBLISH_GRACE_SECONDS", 0.0)
    migrations.upgrade(sqlite_url)
    database = Database(sqlite_url)
    world = World(database, database.run(reading.ensure_tenants, ["acme"])["acme"])
    submitted = [world.submit() for _ in range(6)]
    settings = Settings(
        data=tmp_path, broker_url=redis_url, redis_url=redis_url, maintenance_seconds=3600
    )
    courier = Courier(settings, database)
    maintenance = Maintenance(settings, database, courier)
    maintenance.start()
    until(lambda: courier.broker.depth(submitted[0].lane) == 6, 10, "all messages")
    maintenance.stop()
    courier.close()
    database.close()
