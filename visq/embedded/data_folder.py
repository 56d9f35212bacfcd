"""The data folder of the embedded stack: one stack at a time, one key, everything in one place.

::

    visq-data/
      visq.db           SQLite (and its -wal, -shm)
      valkey/           append-only file of the Valkey server
      objects/          the folder object store: objects/<bucket>/<key>
      logs/             api.log, worker.log
      api-key           made once; only its owner may read it
      connection.json   while the stack runs: where, and with which key
      lock              held while the stack runs
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType

from visq.embedded.connection import ConnectionInfo, write_secret
from visq.errors import ConfigurationError


class DataFolder:
    """The folder `path`, ours as long as this context lasts; made if it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.logs = self.path / "logs"
        self.objects = self.path / "objects"
        self._lock: int | None = None

    def __enter__(self) -> DataFolder:
        """:raises ConfigurationError: if another stack runs on it, or it cannot be written."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            # Now, so that all processes notice when it is gone later.
            self.objects.mkdir(exist_ok=True)
            # Not inheritable (PEP 446): a child that lives on must not hold the lock.
            self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise ConfigurationError(f"the data folder cannot be used: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__(None, None, None)
            raise ConfigurationError(_in_use(self.path)) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def api_key(self) -> str:
        """Return the folder's key, made at the first call."""
        path = self.path / "api-key"
        if not path.exists():
            write_secret(path, secrets.token_urlsafe(32) + "\n")
        return path.read_text().strip()


def _in_use(path: Path) -> str:
    running = ConnectionInfo.read(path)
    where = f" (process {running.pid}, {running.url})" if running else ""
    return (
        f"another `visq up` runs on the data folder {path}{where}; stop it, or name another folder "
        f"with --data"
    )
