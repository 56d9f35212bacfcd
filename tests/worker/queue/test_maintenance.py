"""When the maintenance loop does which of its steps."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import pytest

from models.database import Database
from tests.waiting import until
from visq.settings import Settings
from worker.queue import Courier, Maintenance

STEPS = (
    "expire_jobs",
    "rescue_jobs",
    "cancel_batch_items",
    "fill_windows",
    "publish_jobs",
    "publish_events",
)


class Watched(Maintenance):
    """Only notes its steps."""

    def __init__(self, maintenance_seconds: float, folder: Path) -> None:
        settings = Settings(data=folder, maintenance_seconds=maintenance_seconds)
        super().__init__(settings, cast("Database", None), cast("Courier", None))
        self.steps: list[str] = []
        self.lock = threading.Lock()
        for name in STEPS:
            setattr(self, name, self._noting(name))

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
