"""All of visq on private servers, to be broken: two APIs and three workers over PostgreSQL or
SQLite, Redis or RabbitMQ, and an S3 endpoint.

The first API and the first worker reach their servers through proxies. Processes that have ended
are started again by `tend`, as an orchestrator would. All of it is for one thread: the kernel ends
the processes with the thread that started them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, TypeVar

import httpx2
import psutil
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from models.database import Database, db_now
from models.tables import Job, JobEvent
from tests.deployment import API_KEY
from tests.faults import process
from tests.faults.disk import SmallDisk
from tests.faults.pictures import BUCKET, FILES, Gallery
from tests.faults.process_handle import Process
from tests.faults.proxy import Proxy, url_through
from tests.faults.store import LyingStore
from tests.servers import PostgreSQL, RabbitMQ, S3Endpoint, Server, Valkey
from tests.waiting import until
from visq.embedded.processes import free_port
from visq.errors import Unavailable
from visq.pixels import NAME_PREFIX
from visq.types import JobStatus

T = TypeVar("T")

LEASE_SECONDS: Final = 3.0
SHARED_MEMORY: Final = Path("/dev/shm")
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
        self.redis_lost_at: datetime | None = None
        """When Redis has last lost what it held in this round, by the database's clock."""
        self._dead: list[Process] = []
        """They are not started again for a while."""
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
        self.s3.create_bucket(FILES)
        self.gallery = Gallery(self.s3.client())
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
        self.reader = Database(self.database_url)
        self._running.callback(self.reader.close)
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
        """Processes that still live, once the system has ended, and pictures in shared memory."""
        control = str(self.folder / "control")
        found = []
        for each in psutil.process_iter():
            with suppress(psutil.Error):
                if each.environ().get(process.CONTROL) == control:
                    found.append(f"{' '.join(each.cmdline())} ({each.pid})")
        ours = {str(pid) for each in self.processes for pid in each.pids}
        prefix = NAME_PREFIX.removeprefix("/")
        for segment in SHARED_MEMORY.glob(f"{prefix}*"):
            if segment.name.removeprefix(prefix).partition("-")[0] in ours:
                found.append(str(segment))
        return found

    def ask(self, question: Callable[[Session], T]) -> T:
        """The database, patiently: it may just have been restarted."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.reader.read(question)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def now(self) -> datetime:
        """By the database's clock."""
        return self.ask(lambda session: session.execute(select(db_now())).scalar_one())

    def newest_job(self) -> str:
        """Its id; those of later ones are greater."""
        newest = select(func.max(Job.id))
        return self.ask(lambda session: session.scalar(newest)) or "job_"

    def note_loss_of_redis(self) -> None:
        """Just now it has lost all that it held, results in its queues included."""
        self.redis_lost_at = self.now()

    def held_by(self, worker: Process) -> int:
        """How many jobs it runs."""
        held = select(func.count()).where(
            Job.status == JobStatus.RUNNING, Job.worker.contains(f":{worker.pid}:")
        )
        return self.ask(lambda session: session.scalar(held)) or 0

    def claimed_by(self, worker: Process) -> int:
        """How many claims it has made."""
        made = select(func.count()).where(
            JobEvent.to_status == JobStatus.RUNNING, JobEvent.worker.contains(f":{worker.pid}:")
        )
        return self.ask(lambda session: session.scalar(made)) or 0

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
            if not each.alive and each not in self._dead:
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
        self.gallery.heal()
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
    def without(self, processes: Sequence[Process]) -> Iterator[None]:
        """Kill them, and start them again afterwards."""
        self._dead += processes
        for each in processes:
            each.kill()
        try:
            yield
        finally:
            for each in processes:
                self._dead.remove(each)
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

    # --- the parts ---------------------------------------------------------------------------

    def _restart(self, worker: Process) -> None:
        before = worker.starts
        worker.terminate()
        self.wait_for(lambda: worker.starts > before, 30)

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
            each.go_on()
            each.terminate()
        for each in self.processes:
            each.end()


def _ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False
