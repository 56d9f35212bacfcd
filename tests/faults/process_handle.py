"""A process of a system under faults, as the test that breaks it holds it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.faults import process
from visq.embedded.processes import end, start_tethered
from visq.points import Point


class Process:
    """An API or a worker."""

    def __init__(
        self, name: str, kind: str, folder: Path, environment: Mapping[str, str], control: Path
    ) -> None:
        self.name = name
        self.kind = kind
        self.environment = dict(environment)
        self.log = folder / f"{name}.log"
        self.starts = 0
        self.pids: list[int] = []
        """Of all its starts."""
        self._control = control
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def start(self, **extra: str) -> None:
        """:param extra: more of its environment, until its next start."""
        command = [sys.executable, "-m", "tests.faults.process", self.name, self.kind]
        self._popen = start_tethered(command, log=self.log, env=self.environment | extra)
        self.starts += 1
        self.pids.append(self._popen.pid)

    def kill(self) -> None:
        """``kill -9``, to it alone: what it started must notice by itself."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """It stands still, as on a machine that is out of memory or was migrated."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def arm(self, point: Point, passes: int, deed: process.Deed = "kill") -> None:
        process.arm(self._control, self.name, point, passes, deed)

    @property
    def struck(self) -> bool:
        """Whether it has met what it was armed with last."""
        return not (self._control / self.name).exists()

    def disarm(self) -> None:
        (self._control / self.name).unlink(missing_ok=True)

    @property
    def stopped(self) -> bool:
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False

    def engine(self) -> psutil.Process | None:
        """The engine's process of a worker, if there is one just now."""
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            engine = psutil.Process(int((self._control / f"{self.name}.engine").read_text()))
            return engine if engine.ppid() == self.pid else None
        return None

    def end(self) -> None:
        if self._popen is not None:
            self.go_on()
            end(self._popen, 20)

    def _signal(self, number: signal.Signals) -> None:
        if self._popen is not None and self._popen.poll() is None:
            self._popen.send_signal(number)
