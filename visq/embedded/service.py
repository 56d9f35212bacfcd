"""One process of the embedded stack, and what happens when it ends by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from visq.embedded.processes import end, start_tethered, wait_until
from visq.errors import Unavailable

QUICK_DEATH_SECONDS: Final = 20.0
"""A process that ends sooner than this after its start has died quickly."""
FIRST_WAIT_SECONDS = 0.25
"""Before the first new start; doubles with each quick death."""
QUICK_DEATHS: Final = 5
"""After this many quick deaths in a row there is no sense in another start."""


class Service:
    """A child process that can be supervised. All but `kill` is for one thread at a time."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        is_ready: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
        start_seconds: float = 30.0,
        stop_seconds: float = 10.0,
    ) -> None:
        """:param death_signal: what it gets when the thread that started it ends."""
        self.name = name
        self.command = command
        self.log = log
        self.is_ready = is_ready
        self.environment = environment
        self.death_signal = death_signal
        self.start_seconds = start_seconds
        self.stop_seconds = stop_seconds
        self.process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._quick_deaths = 0
        self._restart_at = 0.0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process; it may not be ready yet."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        self.process = start_tethered(
            self.command, log=self.log, env=self.environment, death_signal=self.death_signal
        )

    def wait_ready(self) -> None:
        """:raises Unavailable: if it ends first, or takes longer than `start_seconds`."""
        if not wait_until(self.is_ready, self.start_seconds, process=self.process):
            self.kill()
            raise Unavailable(f"{self.name} did not start; {self._end_of_log()}")

    def stop(self) -> None:
        """Ask it to end, wait `stop_seconds`, then kill what is left of it."""
        if (process := self.process) is not None:
            end(process, self.stop_seconds)
            self.process = None

    def kill(self) -> None:
        """``kill -9`` to it and to what it started, also while another thread waits in `stop`."""
        if (process := self.process) is not None:
            _kill_session(process)
            process.wait()
            self.process = None

    def revive(self, tell: Callable[[str], None]) -> None:
        """Start it again if it has ended by itself, later each time that it dies quickly.

        :raises Unavailable: when it has died quickly too often.
        """
        now = time.monotonic()
        if self.process is not None and (status := self.process.poll()) is not None:
            _kill_session(self.process)  # what it started must not meet its successor
            self.process = None
            quick = now - self._started < QUICK_DEATH_SECONDS
            self._quick_deaths = self._quick_deaths + 1 if quick else 0
            if self._quick_deaths >= QUICK_DEATHS:
                raise Unavailable(
                    f"{self.name} ended {QUICK_DEATHS} times soon after its start; "
                    + self._end_of_log()
                )
            wait = FIRST_WAIT_SECONDS * 2**self._quick_deaths
            self._restart_at = now + wait
            tell(f"{self.name} ended ({_how(status)}); starting it again in {wait:g} s")
        elif self.process is None and now >= self._restart_at:
            self.start()

    def _end_of_log(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"the end of {self.log}:\n" + "\n".join(text.splitlines()[-lines:])


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _how(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
