"""How a client on this machine finds the running embedded stack: ``<data>/connection.json``."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ValidationError


class ConnectionInfo(BaseModel):
    """Where a running `visq up` answers, and the key to it. Only the owner may read the file."""

    url: str
    """Of the API."""
    api_key: str
    redis_url: str
    broker_url: str
    """Where results are published: what `visq.consume` connects to."""
    pid: int
    """Of `visq up`."""

    @staticmethod
    def path(data: Path) -> Path:
        return data / "connection.json"

    def write(self, data: Path) -> None:
        write_secret(self.path(data), self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, data: Path) -> ConnectionInfo | None:
        """Return that of the stack that runs on the folder `data`, or None if none runs."""
        try:
            info = cls.model_validate_json(cls.path(data).read_bytes())
            os.kill(info.pid, 0)
        except (OSError, ValidationError):
            return None
        return info


def write_secret(path: Path, text: str) -> None:
    """Write `path` whole or not at all, readable by its owner only."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)
