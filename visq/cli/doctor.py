"""``visq doctor``: is everything as it should be, and if not, what is to be done?

It asks all servers at once, each in a thread of its own, and waits `ANSWER_SECONDS` for them: one
that does not answer is a finding, and neither holds up the command nor the other questions.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from queue import Empty, SimpleQueue
from shlex import quote
from typing import Final, Generic, TypeVar

import typer
from rich.markup import escape

from visq.cli import checks, findings
from visq.cli.console import console, mount_rooms
from visq.cli.findings import Finding
from visq.cli.operator import WHICH_DATABASE
from visq.cli.show_settings import hide_password
from visq.embedded.connection import ConnectionInfo
from visq.errors import ConfigurationError, VisqError
from visq.settings import Settings

T = TypeVar("T")

ANSWER_SECONDS: Final = 10.0

COLOURS: Final = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def run(settings: Settings, *, as_json: bool) -> bool:
    """Examine, and print what was found; returns whether there is no problem."""
    mount_rooms("api", "sqlalchemy")
    found = list(examine(settings, ANSWER_SECONDS))
    well = all(finding.level != "problem" for finding in found)
    if as_json:
        listed = [asdict(finding) for finding in found]
        typer.echo(json.dumps({"ok": well, "findings": listed}, indent=2))
    else:
        for finding in found:
            _print(finding)
    return well


def _print(finding: Finding) -> None:
    colour = COLOURS[finding.level]
    console.print(
        f"[{colour}]{finding.level:<8}[/] [bold]{finding.check:<14}[/] {escape(finding.message)}",
        soft_wrap=True,
    )
    if finding.advice and finding.level != "ok":
        console.print(f"{'':<24}[dim]-> {escape(finding.advice)}[/]", soft_wrap=True)


def examine(settings: Settings, seconds: float) -> Iterator[Finding]:
    """Ask everything; what does not answer within `seconds` is a problem."""
    deadline = time.monotonic() + seconds
    database = Asked(checks.ask_database, settings)
    broker = Asked(checks.ask_broker, settings)
    redis = Asked(checks.ask_redis, settings)
    store = Asked(checks.ask_store, settings)
    disks = Asked(checks.ask_disks, settings)
    running = ConnectionInfo.read(settings.data) is not None
    unset = not running and not {"redis_url", "broker_url"} & settings.model_fields_set
    up = f"no `visq up` runs on {settings.data}: start one, name its folder with --data, or set "
    broker_advice = f"{up}VISQ_BROKER_URL" if unset else _BROKER_AWAY
    redis_advice = f"{up}VISQ_REDIS_URL" if unset else _REDIS_AWAY

    found_database = database.answer(deadline)
    if found_database is None:
        yield _away("database", database, hide_password(settings.database), _DATABASE_AWAY)
    else:
        yield findings.database(found_database, settings)
    broker.answer(deadline)
    if broker.failure is not None:
        yield _away("broker", broker, hide_password(settings.broker), broker_advice)
    else:
        yield from findings.broker(broker.answer(deadline), settings)
    found_redis = redis.answer(deadline)
    if found_redis is None:
        yield _away("redis", redis, hide_password(settings.redis), redis_advice)
    else:
        yield findings.redis(settings)
    found_store = store.answer(deadline)
    if found_store is None:
        yield _away("object store", store, settings.objects, _STORE_AWAY)
    else:
        yield Finding("object store", "ok", found_store)
    found_disks = disks.answer(deadline)
    if found_disks is None:
        yield _away("disk", disks, "the free space", "is a network file system away?")
    else:
        yield findings.disks(found_disks)

    checkup = None if found_database is None else found_database.checkup
    at_redis, workers = found_redis or (None, None)
    yield from findings.clocks(checkup, at_redis)
    if workers is None:
        yield Finding("workers", "warning", "not looked at, as Redis could not be asked")
    else:
        queued = 0 if checkup is None else checkup.queued.count
        start = f"restart the `visq up` of {settings.data}" if running else "start `visq worker`"
        yield from findings.workers(workers, queued, start)
    if checkup is None:
        yield Finding("jobs", "warning", "not looked at, as the database could not be asked")
        return
    yield findings.queue(checkup, workers, settings)
    for judge in (
        findings.leases,
        findings.deadlines,
        findings.turns,
        findings.outbox,
    ):
        yield judge(checkup)
    named = "data" in settings.model_fields_set and "VISQ_DATA" not in os.environ
    yield findings.dead_jobs(checkup, f" --data {quote(str(settings.data))}" if named else "")


class Asked(Generic[T]):
    """A question that is being asked in a thread, which ends with the process at the latest."""

    def __init__(self, question: Callable[[Settings], T], settings: Settings) -> None:
        self._said: SimpleQueue[tuple[T | None, VisqError | Exception | None]] = SimpleQueue()
        self._answer: T | None = None
        self._heard = False
        self.failure: Exception | None = None
        """Why there is no answer."""
        threading.Thread(target=self._ask, args=(question, settings), daemon=True).start()

    def answer(self, deadline: float) -> T | None:
        """The answer, or ``None`` and a `failure`; waits for it until `deadline` (monotonic)."""
        if not self._heard:
            self._heard = True
            try:
                left = max(0.0, deadline - time.monotonic())
                self._answer, self.failure = self._said.get(timeout=left)
            except Empty:
                self.failure = TimeoutError("gives no answer, and does not refuse one")
        return self._answer

    def _ask(self, question: Callable[[Settings], T], settings: Settings) -> None:
        try:
            self._said.put((question(settings), None))
        except Exception as error:  # noqa: BLE001 (whatever it is, the other questions go on)
            self._said.put((None, error))


_WAITING = "start it, or mend its URL; until then"
_DATABASE_AWAY = f"{_WAITING} the API answers 503, and what runs is ended and stored later"
_BROKER_AWAY = f"{_WAITING} jobs are accepted and wait in the database, and results in the outbox"
_REDIS_AWAY = (
    f"{_WAITING} there are no token streams, results wait in the outbox, and nobody knows which "
    "workers live"
)
_STORE_AWAY = f"{_WAITING} uploads are refused, and jobs with pictures are tried again"


_FITTING: Final = (
    (
        ("password", "authentication", "wrongpass", "noauth", "access_refused", "access refused"),
        "it answers, but refuses this login: mend user and password in its URL",
    ),
    (
        ("readonly", "read-only", "permission denied", "unable to open"),
        "let this user read and write the file and its folder",
    ),
    (
        ("not a database", "malformed"),
        "the file is damaged, or another's: restore it from a backup, or name another one",
    ),
)
"""Words in what a server says, and what to do then in place of starting it."""


def _away(check: str, asked: Asked[T], where: str, advice: str) -> Finding:
    error = asked.failure
    said = str(error).lower()
    advice = next((fits for words, fits in _FITTING if any(w in said for w in words)), advice)
    if isinstance(error, ConfigurationError):
        hint = WHICH_DATABASE if check == "database" else "see `visq config`"
        return Finding(check, "problem", error.message, hint)
    if isinstance(error, VisqError | TimeoutError):
        return Finding(check, "problem", f"{where}: {error}", advice)
    return Finding(check, "problem", f"{where}: {type(error).__name__}: {error}", advice)
