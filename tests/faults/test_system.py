"""The system of the rounds: what it leaves behind is found."""

from __future__ import annotations

import os
from pathlib import Path

from tests.faults.process import CONTROL
from tests.faults.process_handle import Process
from tests.faults.system import SHARED_MEMORY, System
from tests.waiting import until
from visq.embedded.processes import end, start_tethered
from visq.pixels import NAME_PREFIX


def test_processes_and_shared_memory_that_a_system_leaves_behind_are_found(tmp_path: Path) -> None:
    system = System(tmp_path, "sqlite")
    assert system.left_behind() == []
    environment = os.environ | {CONTROL: str(tmp_path / "control")}
    left = start_tethered(["sleep", "60"], env=environment)
    worker = Process("worker-0", "worker", tmp_path, environment, tmp_path)
    worker.pids.append(left.pid)
    system.processes.append(worker)
    segment = SHARED_MEMORY / f"{NAME_PREFIX.lstrip('/')}{left.pid}-test"
    segment.touch()
    try:
        until(lambda: len(system.left_behind()) == 2, 5, "the two")
        assert system.left_behind() == [f"sleep 60 ({left.pid})", str(segment)]
    finally:
        segment.unlink()
        end(left, 0)
    assert system.left_behind() == []
