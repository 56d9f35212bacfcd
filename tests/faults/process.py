"""A process of visq that a test can break: ``python -m tests.faults.process NAME (api | worker)``.

It is the real one, but for four things: a worker's engine is `PlayedEngine`; batches are read and
written in small parts (`work_in_small_parts`); it dies, ends or stops at a point of `visq.points`
when a file tells it to (`arm`); and the environment may ask for a clock that is off
(`tests.faults.clock`) or for a promise to be broken (``FAULT_MUTATION``).
"""

from __future__ import annotations

from tests.faults import clock  # noqa: F401 (first of all: the others may import the time)

# isort: split

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from tests.faults import mutations
from tests.faults.played_engine import PlayedEngine
from visq import points
from visq.points import Point
from visq.settings import Settings
from worker.engine import child, process
from worker.engine.config import EngineConfig
from worker.queue import batch_loop, batch_reading, batch_writing

CONTROL = "FAULT_CONTROL"
"""Names the folder with the files that arm processes, and with the ids of engines' processes."""
NAME = "FAULT_NAME"

Deed = Literal["kill", "terminate", "stop"]
_SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}


def arm(folder: Path, name: str, point: Point, passes: int, deed: Deed) -> None:
    """Let the process `name` be struck when it comes by `point` for that many times from now on.

    The order is a file of its name: who takes it away calls the deed off, and it goes when the deed
    is done.
    """
    written = folder / f"{name}.new"
    written.write_text(f"{point} {passes} {deed} {time.monotonic_ns()}")
    written.replace(folder / name)


class _Trap:
    """Listens at the points, and strikes where its order says."""

    def __init__(self, order: Path) -> None:
        self._order = order
        self._lock = threading.Lock()
        self._read = ""
        self._passes = 0
        """Of the order that was read last."""

    def __call__(self, point: Point) -> None:
        with self._lock:
            try:
                read = self._order.read_text()
            except FileNotFoundError:
                return
            where, passes, deed, _ = read.split()
            if read != self._read:
                self._read, self._passes = read, 0
            if where != point:
                return
            self._passes += 1
            if self._passes == int(passes):
                self._order.unlink(missing_ok=True)
                os.kill(os.getpid(), _SIGNALS[deed])


def work_in_small_parts() -> None:
    """So that a small file has many of them, and another process takes over soon."""
    constants: dict[ModuleType, dict[str, Any]] = {
        batch_loop: {"HOLD_SECONDS": 3.0},
        batch_reading: {"CHUNK": 16},
        batch_writing: {"PAGE": 16},
    }
    for module, values in constants.items():
        for constant, value in values.items():
            assert hasattr(module, constant)
            setattr(module, constant, value)


def play(connection: Connection[Any, Any], config: EngineConfig, owner: int) -> None:
    """The engine's process. The module that would load torch is not imported."""
    Path(os.environ[CONTROL], f"{os.environ[NAME]}.engine").write_text(str(os.getpid()))
    opening: Any = ModuleType("worker.engine.opening")
    opening.open_engine = PlayedEngine
    sys.modules[opening.__name__] = opening
    child.main(connection, config, owner)


def main() -> None:
    name, command = sys.argv[1:]
    os.environ[NAME] = name
    if "FAULT_MUTATION" in os.environ:
        mutations.MUTATIONS[os.environ["FAULT_MUTATION"]]()
    work_in_small_parts()
    points.listen(_Trap(Path(os.environ[CONTROL]) / name))
    if command == "api":
        from api.main import serve

        serve(Settings())
    else:
        from worker import main as worker_main

        process.child = SimpleNamespace(main=play)  # type: ignore[assignment]
        raise SystemExit(worker_main.run(Settings()))


if __name__ == "__main__":
    main()
