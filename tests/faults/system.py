"""All of visq on private servers, to be broken: two APIs and three workers over PostgreSQL or
SQLite, Redis or RabbitMQ, and an S3 endpoint.

The first API and the first worker reach their servers through proxies. Processes that have ended
are started again by `tend`, as an orchestrator would. All of it is for one thread: the kernel ends
the processes with the thread that started them.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

import httpx2
import psutil

from tests.deployment import API_KEY
from tests.faults import process
from tests.faults.disk import SmallDisk
from tests.faults.proxy import Proxy, url_through
from tests.faults.store import LyingStore
from tests.servers import PostgreSQL, RabbitMQ, S3Endpoint, Server, Valkey
from tests.waiting import until
from visq.embedded.processes import end, free_port, start_tethered
from visq.points import Point

LEASE_SECONDS: Final = 3.0
BUCKET: Final = "pictures"
DISK_BYTES: Final = 512 * 1024 * 1024
"""Of the disk with the data folders, and with the database if that is SQLite."""

SETTINGS: Final = {
    "api_keys": f"acme:{API_KEY}",
    "concurrency": "16",
    "lease_seconds": str(LEASE_SECONDS),
    "heartbeat_seconds": "0.5",
    "maintenance_seconds": "0.3",
    "republish_seconds": "2",
    "retry_backoff_seconds": "0.2",
    "shutdown_seconds": "0.3",
    "fetch_timeout_seconds": "2",
    "engine_hang_seconds": "3",
    "log_level": "INFO",
}

DatabaseKind = Literal["postgresql", "sqlite"]
BrokerKind = Literal["redis", "rabbitmq"]


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
    def armed(self) -> bool:
        """Whether it has not looked at its order yet."""
        return (self._control / self.name).exists()

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


class System:
    """Servers and processes; a context manager."""

    def __init__(
        self,
        folder: Path,
        database: DatabaseKind = "postgresql",
        broker: BrokerKind = "redis",
        *,
        workers: int = 3,
        mutation: str | None = None,
        **settings: str,
    ) -> None:
        self.folder = folder
        self.database: DatabaseKind = database
        self.broker: BrokerKind = broker
        self.valkey = Valkey(folder / "valkey")
        self.postgres = PostgreSQL(folder / "postgres") if database == "postgresql" else None
        self.rabbitmq = RabbitMQ(folder / "rabbitmq") if broker == "rabbitmq" else None
        self.s3 = S3Endpoint(folder / "s3")
        self.processes: list[Process] = []
        self.redis_lost = 0
        """Times that Redis has lost what it held, results in its queues included."""
        self._workers = workers
        self._settings = SETTINGS | settings
        self._mutation = mutation
        self._running = ExitStack()

    # --- what is there -----------------------------------------------------------------------

    @property
    def apis(self) -> list[Process]:
        return [each for each in self.processes if each.kind == "api"]

    @property
    def workers(self) -> list[Process]:
        return [each for each in self.processes if each.kind == "worker"]

    @property
    def servers(self) -> list[Server | Valkey]:
        found = [self.valkey, self.postgres, self.rabbitmq, self.s3]
        return [server for server in found if server is not None]

    # --- its life ----------------------------------------------------------------------------

    def __enter__(self) -> System:
        self.folder.mkdir(parents=True, exist_ok=True)
        control = self.folder / "control"
        control.mkdir()
        for server in self.servers:
            self._running.enter_context(server)
        disk = self.folder / "disk"
        disk.mkdir()
        self.disk = SmallDisk.mounted(disk, DISK_BYTES)
        if self.disk is not None:
            self._running.callback(self.disk.remove)
        self._running.callback(self._end_processes)
        self.s3.create_bucket(BUCKET)
        self.store = self._running.enter_context(LyingStore(self.s3))
        self.database_proxy, self.redis_proxy, self.broker_proxy = (
            self._running.enter_context(Proxy(port)) for port in self._ports()
        )
        self.database_url = (
            f"sqlite:///{disk / 'visq.db'}"
            if self.postgres is None
            else self.postgres.create_database()
        )
        self.redis_url = self.valkey.url
        self.broker_url = self.valkey.url if self.rabbitmq is None else self.rabbitmq.url
        self._migrate()
        self.urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
        for number, url in enumerate(self.urls):
            self._add("api", number, control, VISQ_PORT=url.rpartition(":")[2])
        for number in range(self._workers):
            self._add("worker", number, control)
        for each in self.processes:
            each.start()
        for url in self.urls:
            until(lambda url=url: _ready(url), 60, f"the API ({self.folder})")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._running.close()

    def left_behind(self) -> list[str]:
        """Processes that still live, once the system has ended."""
        control = str(self.folder / "control")
        found = []
        for each in psutil.process_iter():
            with suppress(psutil.Error):
                if each.environ().get(process.CONTROL) == control:
                    found.append(f"{' '.join(each.cmdline())} ({each.pid})")
        return found

    def objects(self) -> list[str]:
        """Names of all objects in the store."""
        client = self.s3.client()
        return [
            f"s3://{bucket['Name']}/{each['Key']}"
            for bucket in client.list_buckets()["Buckets"]
            for each in client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", [])
        ]

    def tend(self) -> None:
        """Start again what has ended."""
        for each in self.processes:
            if not each.alive:
                each.start()

    def wait(self, seconds: float) -> None:
        """Let it run for a while."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.tend()
            time.sleep(min(0.05, left))

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Let it run until `condition` holds; False if it does not within `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.tend()
            time.sleep(0.05)
        return True

    def heal(self) -> None:
        """All faults are over: all servers run, nobody is stopped, armed or cut off."""
        for proxy in (self.database_proxy, self.redis_proxy, self.broker_proxy):
            proxy.heal()
        self.store.heal()
        for each in self.processes:
            each.disarm()
            each.go_on()
        for server in self.servers:
            if not server.alive:
                server.start()
        if self.disk is not None:
            self.disk.make_room()
        self.tend()

    @contextmanager
    def with_environment(self, worker: Process, **extra: str) -> Iterator[None]:
        """Run a worker with another environment, and as before afterwards."""
        before = dict(worker.environment)
        worker.environment |= extra
        self._restart(worker)
        try:
            yield
        finally:
            worker.environment = before
            self._restart(worker)

    def random_process(self, chance: random.Random) -> Process:
        return chance.choice(self.processes)

    # --- the parts ---------------------------------------------------------------------------

    def _restart(self, worker: Process) -> None:
        worker.terminate()
        self.wait_for(lambda: not worker.alive, 30)
        worker.start()

    def _ports(self) -> tuple[int, int, int]:
        postgres = free_port() if self.postgres is None else self.postgres.port
        broker = self.valkey.port if self.rabbitmq is None else self.rabbitmq.port
        return postgres, self.valkey.port, broker

    def _add(self, kind: str, number: int, control: Path, **extra: str) -> None:
        urls = (self.database_url, self.redis_url, self.broker_url)
        if number == 0:
            proxies = (self.database_proxy, self.redis_proxy, self.broker_proxy)
            urls = tuple(url_through(u, p.port) for u, p in zip(urls, proxies, strict=True))
        name = f"{kind}-{number}"
        values = self._settings | {
            "data": str(self.folder / "disk" / name),
            "database_url": urls[0],
            "redis_url": urls[1],
            "broker_url": urls[2],
        }
        environment = {k: v for k, v in os.environ.items() if not k.startswith("VISQ_")}
        environment |= {f"VISQ_{key.upper()}": value for key, value in values.items()}
        environment |= self.store.environment | {process.CONTROL: str(control)} | extra
        if self._mutation is not None:
            environment["FAULT_MUTATION"] = self._mutation
        self.processes.append(Process(name, kind, self.folder, environment, control))

    def _migrate(self) -> None:
        environment = os.environ | {"VISQ_DATABASE_URL": self.database_url}
        command = [sys.executable, "-m", "visq", "migrate"]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)

    def _end_processes(self) -> None:
        for each in self.processes:
            each.end()


def _ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False
