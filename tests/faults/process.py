"""A process of visq that a test can break: ``python -m tests.faults.process NAME (api | worker)``.

It is the real one, but for three things: a worker's engine is `PlayedEngine`; it dies or stops at
a point of `visq.points` when a file tells it to (`arm`); and the environment may ask for a clock
that is off (``FAULT_CLOCK``, seconds) or for a promise to be broken (``FAULT_MUTATION``).
"""

from __future__ import annotations

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

CONTROL = "FAULT_CONTROL"
"""Names the folder with the files that arm processes, and with the ids of engines' processes."""
NAME = "FAULT_NAME"

Deed = Literal["kill", "stop"]
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def arm(folder: Path, name: str, point: Point, passes: int, deed: Deed) -> None:
    """Let the process `name` be killed, or stopped, when it comes by `point` for that many times
    from now on."""
    written = folder / f"{name}.new"
    written.write_text(f"{point} {passes} {deed}")
    written.replace(folder / name)


class _Trap:
    """Listens at the points, and strikes once it is armed."""

    def __init__(self, order: Path) -> None:
        self._order = order
        self._lock = threading.Lock()
        self._armed: tuple[str, int, str] | None = None

    def __call__(self, point: Point) -> None:
        with self._lock:
            if self._armed is None:
                if not self._order.exists():
                    return
                where, passes, deed = self._order.read_text().split()
                self._order.unlink()
                self._armed = (where, int(passes), deed)
            where, passes, deed = self._armed
            if where != point:
                return
            self._armed = (where, passes - 1, deed)
            if passes == 1:
                self._armed = None
                os.kill(os.getpid(), _SIGNALS[deed])


def play(connection: Connection[Any, Any], config: EngineConfig, owner: int) -> None:
    """The engine's process. The module that would load torch is not imported."""
    Path(os.environ[CONTROL], f"{os.environ[NAME]}.engine").write_text(str(os.getpid()))
    opening: Any = ModuleType("worker.engine.opening")
    opening.open_engine = PlayedEngine
    sys.modules[opening.__name__] = opening
    child.main(connection, config, owner)


def _set_clock_off(seconds: float) -> None:
    """This process's clock, as Python's code sees it."""
    read, read_ns = time.time, time.time_ns
    time.time = lambda: read() + seconds
    time.time_ns = lambda: read_ns() + round(seconds * 1e9)


def main() -> None:
    name, command = sys.argv[1:]
    os.environ[NAME] = name
    if "FAULT_CLOCK" in os.environ:
        _set_clock_off(float(os.environ["FAULT_CLOCK"]))
    if "FAULT_MUTATION" in os.environ:
        mutations.MUTATIONS[os.environ["FAULT_MUTATION"]]()
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
