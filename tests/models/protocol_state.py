"""What the model of the protocol looks at: all rows of the tables, and what must hold of them.

`Snapshot` is what has been committed; `Ledger` remembers what snapshots cannot show: which events
the world was told, and how sessions began. `check` raises an `AssertionError` that names the job.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.orm import Session

from models.base import Base
from models.database import db_now
from models.moves import SHARED_CRASHES
from models.tables import Batch, BatchEnd, ChatSession, Job, JobEvent, Message, Outbox
from models.views import batch_view, job_view
from visq.types import JobStatus as S

Row = Any
"""A row with its columns as attributes; equal if all columns are."""

TABLES: tuple[type[Base], ...] = (Job, JobEvent, ChatSession, Message, Batch, BatchEnd, Outbox)
COLUMNS = {
    kind: [getattr(kind, each.key).label(each.key) for each in inspect(kind).column_attrs]
    for kind in TABLES
}
ALL_ROWS = {
    kind: select(*columns).order_by(inspect(kind).primary_key[0])
    for kind, columns in COLUMNS.items()
}
TIMES = ("created_at", "started_at", "finished_at", "expires_at")

LEGAL: Mapping[S | None, frozenset[S]] = {
    None: frozenset({S.WAITING, S.QUEUED}),
    S.WAITING: frozenset({S.QUEUED, S.CANCELLED, S.EXPIRED}),
    S.QUEUED: frozenset({S.RUNNING, S.CANCELLED, S.EXPIRED}),
    S.RUNNING: frozenset({S.QUEUED, S.SUCCEEDED, S.FAILED, S.CANCELLED, S.EXPIRED}),
    S.FAILED: frozenset({S.QUEUED}),
    S.SUCCEEDED: frozenset(),
    S.CANCELLED: frozenset(),
    S.EXPIRED: frozenset(),
}
"""The state machine, written down once more than in models/jobs.py."""


@dataclass(frozen=True)
class Snapshot:
    """All rows, by id; events and messages in their order."""

    now: datetime
    rows: Mapping[type[Base], Mapping[Any, Row]]

    @property
    def jobs(self) -> Mapping[str, Row]:
        return self.rows[Job]

    @property
    def sessions(self) -> Mapping[str, Row]:
        return self.rows[ChatSession]

    @property
    def batches(self) -> Mapping[str, Row]:
        return self.rows[Batch]

    @property
    def outbox(self) -> Mapping[str, Row]:
        return self.rows[Outbox]

    def events(self) -> Mapping[str, list[Row]]:
        """By job, in the order in which they were written."""
        return _grouped(self.rows[JobEvent].values(), "job_id")

    def turns(self) -> Mapping[str, list[Row]]:
        """The jobs of each session, by turn."""
        turns = _grouped((job for job in self.jobs.values() if job.session_id), "session_id")
        return {key: sorted(jobs, key=lambda job: job.turn) for key, jobs in turns.items()}

    def messages(self, session_id: str) -> list[Row]:
        """The session's history, in order."""
        rows = [row for row in self.rows[Message].values() if row.session_id == session_id]
        return sorted(rows, key=lambda row: (row.turn, row.position))

    def items(self) -> Mapping[str, list[Row]]:
        """The jobs of each batch, by position."""
        items = _grouped((job for job in self.jobs.values() if job.batch_id), "batch_id")
        return {key: sorted(jobs, key=lambda job: job.position) for key, jobs in items.items()}

    def changed(self, kind: type[Base], other: Snapshot) -> set[Any]:
        """Ids of the rows that are not the same in `other`, or not there."""
        mine, others = self.rows[kind], other.rows[kind]
        return {key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key)}


def look(session: Session) -> Snapshot:
    """Read everything, in one transaction."""
    connection = session.connection()
    rows = {
        kind: {_key(row): row for row in connection.execute(statement)}
        for kind, statement in ALL_ROWS.items()
    }
    return Snapshot(session.scalars(select(db_now())).one(), rows)


def _key(row: Row) -> Any:
    return row.id if hasattr(row, "id") else (row.batch_id, row.number)


@dataclass
class Ledger:
    """What was seen of one world since it began."""

    names: dict[str, str] = field(default_factory=dict)
    """Short names of ids, in the order of their appearance."""
    given: dict[str, timedelta | None] = field(default_factory=dict)
    """By job: the time from its submission to its first deadline."""
    origins: dict[str, tuple[int, list[tuple[int, int, str]]]] = field(default_factory=dict)
    """By session: the turns with which it began, and (turn, position, job) of its messages."""
    payloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each event that was ever in the outbox."""
    told: dict[str, int] = field(default_factory=dict)
    """By event: how often it was published and confirmed."""

    def name(self, id_: str) -> str:
        return self.names.get(id_, id_)

    def learn(self, seen: Snapshot) -> None:
        """Take in what is new, each session and event as it begins."""
        for job_id in dict.fromkeys(event.job_id for event in seen.rows[JobEvent].values()):
            if job_id not in self.names:
                job = seen.jobs[job_id]
                self._called("job", job_id)
                self.given[job_id] = job.expires_at and job.expires_at - job.created_at
        for batch_id in seen.batches:
            self._called("batch", batch_id)
        turns = seen.turns()
        for session_id, row in seen.sessions.items():
            if session_id not in self.origins:
                self._called("session", session_id)
                began = row.turns - len(turns.get(session_id, ()))
                self.origins[session_id] = began, _origins(seen.messages(session_id), began)
        for event_id, row in seen.outbox.items():
            if event_id not in self.payloads:
                self.payloads[event_id] = row.payload
                self._called("event", event_id)
                _check_new_event(self, seen, row)

    def _called(self, kind: str, id_: str) -> None:
        if id_ not in self.names:
            count = sum(name.startswith(f"{kind} ") for name in self.names.values())
            self.names[id_] = f"{kind} {count + 1}"


def check(seen: Snapshot, ledger: Ledger) -> None:
    """Every promise that holds at each commit."""
    events = seen.events()
    ends: Mapping[str, list[str]] = _ends(ledger)
    for job in seen.jobs.values():
        name = ledger.name(job.id)
        _check_life(name, job, events.get(job.id, []))
        _check_columns(name, job)
        _check_events(name, job, events[job.id], ends.get(job.id, []), ledger)
    _check_outbox(seen, ledger)
    _check_sessions(seen, ledger)
    _check_batches(seen, ledger)


def _check_life(name: str, job: Row, events: list[Row]) -> None:
    """The history is a path of the state machine that ends where the job is."""
    path = [event.to_status for event in events]
    assert events, f"{name} has no history"
    for event in events:
        legal = event.to_status in LEGAL[event.from_status]
        assert legal, f"{name} went from {event.from_status} to {event.to_status}"
    assert events[0].from_status is None, f"{name} began as {events[0].from_status}"
    for before, after in pairwise(events):
        assert after.from_status is before.to_status, f"{name} has a gap in its history: {path}"
    assert path[-1] is job.status, f"{name} is {job.status}; its history ends in {path[-1]}"
    claims = 0
    for event in events:
        claims += event.to_status is S.RUNNING
        assert event.attempt == claims, f"{name}: {event.attempt} is not the attempt at {path}"
    assert job.attempt == claims, f"{name} was claimed {claims} times at attempt {job.attempt}"


def _check_columns(name: str, job: Row) -> None:
    """The columns fit the state."""
    for column, fits in (
        ("lease_expires_at", job.status is S.RUNNING),
        ("finished_at", job.status.is_terminal),
        ("error_code", job.status is S.FAILED),
        ("result", job.status is S.SUCCEEDED),
    ):
        value = getattr(job, column)
        assert (value is not None) == fits, f"{name} is {job.status} with {column} = {value}"
    if job.status is not S.QUEUED:
        assert job.publish_at is None, f"{name} is {job.status} and to be published"
    elif job.batch_id is None:
        assert job.publish_at is not None, f"{name} is queued and never published"
    if job.status in (S.WAITING, S.QUEUED):
        assert job.worker is None, f"{name} is {job.status} and held by {job.worker}"
        assert job.cancel_requested_at is None, f"{name} is cancelled, but {job.status} for ever"
    if job.status is S.RUNNING:
        assert job.worker is not None, f"{name} is running nowhere"
    if job.status is S.SUCCEEDED:
        answer = job.result["text"]
        assert answer == answer_of(job.id, job.attempt), f"{name} has another's answer: {answer!r}"
    assert job.failures <= job.max_attempts, f"{name} has failed {job.failures} times"
    assert max(job.failures, job.crashes) <= job.attempt, f"{name} failed more often than it ran"
    assert job.dead_at is None or job.status is S.FAILED, f"{name}: a dead letter is {job.status}"
    if job.dead_at is not None:
        assert job.failures == job.max_attempts, f"{name} was given up with attempts left"


def _check_events(
    name: str, job: Row, events: list[Row], published: list[str], ledger: Ledger
) -> None:
    """One result event for each end, and the last one says what the row says."""
    ended = [event.to_status for event in events if event.to_status.is_terminal]
    told = [ledger.payloads[event_id]["data"]["status"] for event_id in published]
    assert told == ended, f"{name} ended as {ended}; its events say {told}"
    if job.status.is_terminal:
        payload = ledger.payloads[published[-1]]
        assert _timeless(payload["data"]) == _timeless(_shown(job)), f"{name} is not as it was told"


def _check_new_event(ledger: Ledger, seen: Snapshot, row: Row) -> None:
    if row.kind == "batch":
        batch = seen.batches[row.payload["subject"]]
        shown = batch_view(batch).model_dump(mode="json")
        assert row.payload["data"] == shown, f"{ledger.name(batch.id)} is not as its event says"
        assert row.payload["type"] == f"visq.batch.{batch.status}"
        return
    job = seen.jobs[row.payload["subject"]]
    name = ledger.name(job.id)
    assert job.status.is_terminal, f"{name} is {job.status} and has a result event"
    assert row.payload["id"] == row.id, f"{name}'s event has two ids"
    assert row.payload["type"] == f"visq.job.{job.status}", f"{name}: {row.payload['type']}"
    assert row.payload["data"] == _shown(job), f"{name} is not as its event says"


def _check_outbox(seen: Snapshot, ledger: Ledger) -> None:
    """No event is gone that nobody was told, and none has changed on its way."""
    for event_id, payload in ledger.payloads.items():
        if event_id in seen.outbox:
            same = seen.outbox[event_id].payload == payload
            assert same, f"{ledger.name(event_id)} has changed in the outbox"
        else:
            assert event_id in ledger.told, f"{ledger.name(event_id)} is lost"


def _check_sessions(seen: Snapshot, ledger: Ledger) -> None:
    turns = seen.turns()
    for session_id, row in seen.sessions.items():
        name, jobs = ledger.name(session_id), turns.get(session_id, [])
        began, inherited = ledger.origins[session_id]
        numbers = [job.turn for job in jobs]
        assert numbers == list(range(began + 1, row.turns + 1)), f"{name} has turns {numbers}"
        unfinished = [job for job in jobs if not job.status.is_terminal]
        for place, job in enumerate(unfinished):
            waits = job.status is S.WAITING
            at = f"{name}, turn {job.turn} is {job.status}"
            assert waits == (place > 0), f"{at}; unfinished: {[each.turn for each in unfinished]}"
        expected = [*inherited, *_of_succeeded(jobs)] if row.deleted_at is None else []
        messages = seen.messages(session_id)
        found = [(message.turn, message.position, message.job_id) for message in messages]
        assert found == expected, f"{name} remembers {found}, not {expected}"
        for message in messages:
            said = seen.jobs[message.job_id]
            text = said.result["text"] if message.role == "assistant" else said.request["prompt"]
            assert message.content[0]["text"] == text, f"{name} remembers another text: {text!r}"


def _of_succeeded(jobs: list[Row]) -> list[tuple[int, int, str]]:
    """(turn, position, job) of the messages: a question and an answer each."""
    ended = [job for job in jobs if job.status is S.SUCCEEDED]
    return [(job.turn, position, job.id) for job in ended for position in (0, 1)]


def _check_batches(seen: Snapshot, ledger: Ledger) -> None:
    items, ends = seen.items(), _ends(ledger)
    for batch_id, batch in seen.batches.items():
        name, jobs = ledger.name(batch_id), items[batch_id]
        assert [job.position for job in jobs] == list(range(batch.total)), f"{name} lacks items"
        for status in (S.SUCCEEDED, S.FAILED, S.CANCELLED, S.EXPIRED):
            rows = sum(job.status is status for job in jobs)
            counted = getattr(batch, status.value)
            assert counted == rows, f"{name} counts {counted} {status}; {rows} are"
        ended = all(job.status.is_terminal for job in jobs)
        closed = batch.status.is_terminal
        assert closed == ended, f"{name} is {batch.status}; all of it ended: {ended}"
        assert (batch.finished_at is not None) == ended, f"{name}: {batch.finished_at}"
        told = [ledger.payloads[event_id]["data"]["status"] for event_id in ends.get(batch_id, [])]
        assert not ended or told[-1:] == [batch.status], f"{name} is {batch.status}, told {told}"
        _check_ends(name, batch, jobs, seen)


def _check_ends(name: str, batch: Row, jobs: list[Row], seen: Snapshot) -> None:
    """Each end of an item has the next number, also if the item was retried after it."""
    numbered = [row for row in seen.rows[BatchEnd].values() if row.batch_id == batch.id]
    numbers = sorted(row.number for row in numbered)
    assert numbers == list(range(1, batch.ends + 1)), f"{name} has the ends {numbers}"
    ended = Counter(
        event.job_id
        for event in seen.rows[JobEvent].values()
        if event.to_status.is_terminal and event.job_id in {job.id for job in jobs}
    )
    assert Counter(row.job_id for row in numbered) == ended, f"{name}: an end has no number"


def must_run_alone(job: Row) -> bool:
    return bool(job.crashes >= SHARED_CRASHES)


def answer_of(job_id: str, attempt: int) -> str:
    """What a run answers: another for each claim, so that it tells whose answer was kept."""
    return f"answer of {job_id}, attempt {attempt}"


def _shown(job: Row) -> dict[str, Any]:
    return job_view(job).model_dump(mode="json")


def _timeless(view: dict[str, Any]) -> dict[str, Any]:
    # Time passes by moving the times of the rows; an event cannot know.
    return {key: value for key, value in view.items() if key not in TIMES}


def _ends(ledger: Ledger) -> Mapping[str, list[str]]:
    ends = defaultdict(list)
    for event_id, payload in ledger.payloads.items():
        ends[payload["subject"]].append(event_id)
    return ends


def _origins(messages: list[Row], began: int) -> list[tuple[int, int, str]]:
    return [(row.turn, row.position, row.job_id) for row in messages if row.turn <= began]


def _grouped(rows: Iterator[Row] | Any, column: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[getattr(row, column)].append(row)
    return groups
