"""Servers for the operators' commands, and jobs in the states that those commands are for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import text

from models.outcomes import Failed
from models.tables import Job
from tests.models.conftest import World
from visq.cli import main
from visq.cli.doctor import examine
from visq.cli.findings import Finding
from visq.errors import ImageFetchFailed, VisqError
from visq.settings import Settings
from visq.streams import WorkerInfo, announce_worker


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``visq ...`` in this process, as the installed command does."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["visq", *arguments])
        status = 0
        try:
            main.main()
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return Done(status, said.out, said.err)

    return run


@dataclass
class Jobs(World):
    """Jobs of one tenant, in whatever state."""

    max_attempts: int = 2

    def run_once(self, job_id: str, error: VisqError | None) -> None:
        """Claim it; fail with `error`, if there is one."""
        work = self.claimed(job_id, 300)
        if error is not None:
            self.finish(work, Failed(error, backoff_seconds=0.0))

    def dead(self, message: str = "the store is slow", **fields: Any) -> Job:
        """A dead letter."""
        job = self.submit(**fields)
        for _ in range(2):
            self.run_once(job.id, ImageFetchFailed(message))
        return self.job(job.id)

    def sql(self, statement: str, **parameters: Any) -> None:
        """For states that visq itself does not make, and for time that passes: ``AGO`` is five
        minutes ago."""
        ago = "now() - interval '5 minutes'"
        if self.database.engine.dialect.name == "sqlite":
            ago = "strftime('%Y-%m-%d %H:%M:%f', 'now', '-300 seconds') || '000'"
        self.database.run(
            lambda session: session.connection().execute(
                text(statement.replace("AGO", ago)), parameters
            )
        )


SECONDS = 10.0
"""That the doctor waits for servers."""


def settings_for(database_url: str, redis_url: str, folder: Path, **more: Any) -> Settings:
    urls = {"database_url": database_url, "redis_url": redis_url, "broker_url": redis_url}
    return Settings(**{"data": folder, **urls, **more})


def announce(url: str, *, in_flight: int = 0, engine_down: str | None = None) -> None:
    info = WorkerInfo(
        id="here:1:a",
        model="small",
        engine="native",
        device="cpu",
        dtype="float32",
        concurrency=4,
        in_flight=in_flight,
        engine_down=engine_down,
    )
    with redis.Redis.from_url(url) as client:
        announce_worker(client, info, ttl_seconds=60)


def found(settings: Settings, seconds: float = SECONDS) -> dict[str, Finding]:
    """Findings by what was checked; the last of several."""
    return {each.check: each for each in examine(settings, seconds)}


def wrong(settings: Settings, seconds: float = SECONDS) -> dict[str, Finding]:
    return {each.check: each for each in examine(settings, seconds) if each.level != "ok"}
