"""A deployment of real processes for tests: ``visq api`` and ``visq worker`` over given servers.

Unlike the embedded stack nothing is supervised: a test starts, kills and restarts what it likes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import httpx2
import redis

from tests.waiting import until
from visq import Client
from visq.embedded.processes import end, free_port, start_tethered
from visq.streams import WorkerInfo, live_workers

API_KEY = "secret-of-acme"


class Worker:
    """One worker process."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.info: WorkerInfo | None = None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """``kill -9`` to the worker process alone; its children must notice by themselves."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


class Deployment:
    """API and workers with the settings in `settings` (names without the prefix, lower case)."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.port = free_port()
        given = {"port": str(self.port), "data": str(folder), "api_keys": f"acme:{API_KEY}"}
        defaults = {
            "device": "cpu",
            "engine_threads": "1",
            "concurrency": "4",
            "lease_seconds": "3",
            "heartbeat_seconds": "0.5",
            "maintenance_seconds": "0.2",
            "republish_seconds": "2",
            "retry_backoff_seconds": "0.2",
        }
        values = {**defaults, **given, **settings}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("VISQ_")},
            **{f"VISQ_{name.upper()}": value for name, value in values.items()},
        }
        self.redis_url = values["redis_url"]
        self.workers: list[Worker] = []
        self.api: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> Client:
        return Client(self.url, API_KEY)

    def __enter__(self) -> Deployment:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run("migrate")
        self.start_api()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            end(worker.process, 30)
        if self.api is not None:
            end(self.api, 10)

    def run(self, *command: str) -> None:
        """A command of visq that ends by itself."""
        subprocess.run(
            [sys.executable, "-m", "visq", *command],
            env=self.environment,
            check=True,
            capture_output=True,
            timeout=60,
        )

    def start_api(self) -> None:
        self.api = self._start("api", self.folder / "api.log")
        until(self._api_answers, 60, f"the API ({self.folder / 'api.log'})")

    def start_worker(self) -> Worker:
        """A worker that has announced itself: its model is loaded."""
        known = {info.id for info in self.announced()}
        log = self.folder / f"worker-{len(self.workers)}.log"
        worker = Worker(self._start("worker", log), log)
        self.workers.append(worker)

        def announced() -> WorkerInfo | None:
            if not worker.alive:
                raise AssertionError(f"the worker ended:\n{log.read_text()[-4000:]}")
            return next((info for info in self.announced() if info.id not in known), None)

        worker.info = until(announced, 120, f"the worker ({log})")
        return worker

    def announced(self) -> list[WorkerInfo]:
        """The workers that live, as far as Redis knows."""
        with redis.Redis.from_url(self.redis_url) as client:
            return live_workers(client)

    def _start(self, command: str, log: Path) -> subprocess.Popen[bytes]:
        return start_tethered(
            [sys.executable, "-m", "visq", command], log=log, env=self.environment
        )

    def _api_answers(self) -> bool:
        if self.api is None or self.api.poll() is not None:
            log = (self.folder / "api.log").read_text(errors="replace")
            raise AssertionError(f"the API ended:\n{log[-4000:]}")
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False
