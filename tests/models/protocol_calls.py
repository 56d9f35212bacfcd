"""How the model of the protocol calls `models`: one transaction at a time, each with a fate.

A caller may hear that its transaction was committed, or may not (then it is `Unavailable` to it,
whether the transaction was committed or rolled back). On PostgreSQL a transaction may also stay
under way while others run beside it: what they find locked they leave out, or they wait for it, and
then it ends. After each transaction everything that has been committed is checked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from hypothesis import note
from sqlalchemy import Update, delete, text, update
from sqlalchemy.orm import Session

from models.database import Database, TenantSession, UTCDateTime, db_now
from models.tables import Batch, BatchEnd, ChatSession, Image, Job, JobEvent, Message, Outbox
from tests.models.protocol_state import Ledger, Snapshot, check, look
from visq.errors import VisqError
from visq.types import JobStatus

R = TypeVar("R")

HOLD_AFTER = 0.3
"""Seconds of real time that may pass before the rows' times are moved along with it: what is due in
an example depends on its steps only, not on how fast they are."""

DOUBTFUL_AFTER = 0.9
"""Seconds after which it is not known what was due when a transaction ran (no two times of the
model that are compared lie closer than a second)."""


class Fate(StrEnum):
    """What becomes of a transaction, and what its caller hears."""

    DONE = "done"
    ANSWER_LOST = "committed, but the answer is lost"
    UNDONE = "rolled back"
    SLOW = "under way"
    SLOW_UNDONE = "under way, and then rolled back"


COMMITTED = (Fate.DONE, Fate.ANSWER_LOST, Fate.SLOW)
SLOW = (Fate.SLOW, Fate.SLOW_UNDONE)


@dataclass(frozen=True)
class Reply(Generic[R]):
    """How a transaction went: `value` or `error`, as far as the model knows."""

    value: R | None
    error: VisqError | None
    fate: Fate
    certain: bool
    """Whether no other transaction ended meanwhile, so that the value could be foretold."""
    direct: bool
    """Whether this transaction alone made the difference between `before` and `after`, and nothing
    was locked by another one."""
    before: Snapshot
    after: Snapshot

    @property
    def committed(self) -> bool:
        return self.error is None and self.fate in COMMITTED

    @property
    def heard(self) -> bool:
        """Whether the caller knows `value`."""
        return self.error is None and self.fate in (Fate.DONE, Fate.SLOW)

    def expected(self) -> R:
        """The value of a call that has no reason to fail."""
        assert self.error is None, self.error
        assert self.value is not None
        return self.value


Then = Callable[[Reply[R]], None]


class _RollBackError(Exception):
    """The end of a transaction that is not to be committed."""


@dataclass
class _Held:
    """A transaction that is under way."""

    session: Session
    value: Any
    fate: Fate
    then: Then[Any]
    before: Snapshot


class Calls:
    """Transactions on `database`, a migrated one that this has for itself."""

    def __init__(self, database: Database, tenant_id: str) -> None:
        self.database = database
        self.tenant_id = tenant_id
        self.ledger = Ledger()
        self.overlapping = database.engine.dialect.name == "postgresql"
        self._held: _Held | None = None
        self._held_still_at = time.monotonic()
        self.state = database.read(look)

    def call(
        self,
        fate: Fate,
        then: Then[R],
        function: Callable[..., R],
        *args: Any,
        for_tenant: bool = False,
        **kwargs: Any,
    ) -> None:
        """Run ``function(session, ...)`` in a transaction with this fate; then `then` is told, now
        or when the transaction ends. An API's calls are `for_tenant`."""

        def body(session: Session) -> R:
            session.info["tenant_id"] = self.tenant_id if for_tenant else None
            return function(session, *args, **kwargs)

        self._hold_the_clock()
        began = time.monotonic()
        before, beside = self.state, self._held
        if fate in SLOW and (beside is not None or not self.overlapping):
            fate = Fate.DONE if fate is Fate.SLOW else Fate.UNDONE
        if fate in SLOW:
            self._begin_to_hold(body, fate, then)
            return
        value, error = self._run(body, fate) if beside is None else self._run_beside(body, fate)
        certain = self._held is beside and time.monotonic() - began < DOUBTFUL_AFTER
        self._refresh()
        if beside is not None and self._held is not beside:
            self._tell(beside)
        direct = beside is None
        if (
            self._held is beside
            and (error is not None or value is None)
            and function.__name__ not in SILENT
        ):
            assert not differences(before, self.state), f"nothing came of it, but it wrote: {error}"
        then(Reply(value, error, fate, certain, direct, before, self.state))
        check(self.state, self.ledger)

    def end_held(self) -> None:
        """Let the transaction that is under way come to its end."""
        if self._held is not None:
            held = self._close_held()
            self._refresh()
            self._tell(held)
            check(self.state, self.ledger)

    def pass_time(self, seconds: float) -> None:
        """Make it later by `seconds`: all times of the rows move back."""
        self.end_held()
        self.database.run(_move_times, -seconds)
        self._held_still_at = time.monotonic()
        self._refresh()

    def let_lease_run_out(self, job_id: str) -> None:
        """Nobody has renewed the lease of this running job for as long as it lasts."""
        self._change(
            update(Job)
            .where(Job.id == job_id, Job.status == JobStatus.RUNNING)
            .values(lease_expires_at=db_now(-10.0))
        )

    def let_a_moment_pass(self) -> None:
        """What became due just now (it has left a batch's window) is so, whatever the speed."""
        self._hold_the_clock()
        self._change(
            update(Job)
            .where(Job.publish_at.between(db_now(-1.0), db_now(1.0)))
            .values(publish_at=db_now(-1.0))
        )

    def _change(self, statement: Update) -> None:
        self.end_held()
        options = {"synchronize_session": False}
        self.database.run(lambda session: session.execute(statement, execution_options=options))
        self._refresh()

    def _hold_the_clock(self) -> None:
        passed = time.monotonic() - self._held_still_at
        if passed > HOLD_AFTER and self._held is None:
            self.pass_time(-passed)

    def _run(self, body: Callable[[Session], R], fate: Fate) -> tuple[R | None, VisqError | None]:
        answer: list[R] = []

        def whole(session: Session) -> None:
            answer.append(body(session))
            session.flush()
            if fate is Fate.UNDONE:
                session.expunge_all()  # what it returned can still be looked at
                raise _RollBackError

        try:
            self.database.run(whole)
        except _RollBackError:
            pass
        except VisqError as error:
            return None, error
        return answer[-1], None  # the last, if the transaction was repeated

    def _run_beside(
        self, body: Callable[[Session], R], fate: Fate
    ) -> tuple[R | None, VisqError | None]:
        """Run beside the transaction that is under way; if it is in the way, it ends first."""
        answers: list[tuple[R | None, VisqError | None]] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                answers.append(self._run(body, fate))
            except BaseException as failure:  # noqa: BLE001 (raised again below)
                failures.append(failure)

        thread = threading.Thread(target=run)
        thread.start()
        with self.database.engine.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            while thread.is_alive() and self._held is not None:
                if connection.scalar(WAITS):
                    self._close_held()
                thread.join(0.001)
        thread.join(10)
        assert not thread.is_alive(), "the transaction waits for one that has ended"
        if failures:
            raise failures[0]
        return answers[0]

    def _begin_to_hold(self, body: Callable[[Session], R], fate: Fate, then: Then[R]) -> None:
        session = TenantSession(self.database.engine, expire_on_commit=False)
        try:
            value = body(session)
            session.flush()
        except BaseException as error:
            session.rollback()
            session.close()
            if not isinstance(error, VisqError):
                raise
            then(Reply(None, error, fate, True, False, self.state, self.state))
            return
        note(f"    (under way: {fate})")
        self._held = _Held(session, value, fate, then, self.state)

    def _close_held(self) -> _Held:
        held = self._held
        assert held is not None
        self._held = None
        note(f"    (what was under way is {'committed' if held.fate in COMMITTED else 'undone'})")
        if held.fate in COMMITTED:
            held.session.commit()
        else:
            held.session.expunge_all()
            held.session.rollback()
        held.session.close()
        return held

    def _tell(self, held: _Held) -> None:
        held.then(Reply(held.value, None, held.fate, True, False, held.before, self.state))

    def _refresh(self) -> None:
        self.state = self.database.read(look)
        self.ledger.learn(self.state)

    def abandon(self) -> None:
        """Roll back what is under way, after a failure."""
        if self._held is not None:
            self._held.session.rollback()
            self._held.session.close()
            self._held = None


SILENT = ("mark_published", "publish_again_now", "done")
"""Functions that answer nothing, whatever they wrote."""

WAITS = text(
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


def differences(before: Snapshot, after: Snapshot) -> set[Any]:
    """Ids of all rows that have changed."""
    return {key for kind in before.rows for key in before.changed(kind, after)}


def wipe(session: Session) -> None:
    """Delete all rows but the tenants."""
    for kind in (Outbox, Message, JobEvent, BatchEnd, Job, Batch, ChatSession, Image):
        session.execute(delete(kind), execution_options={"synchronize_session": False})


def _move_times(session: Session, seconds: float) -> None:
    """Add `seconds` to all times of jobs, their histories, and the outbox."""
    sqlite = session.get_bind().dialect.name == "sqlite"
    for kind in (Job, JobEvent, Outbox):
        columns = [each for each in kind.__table__.columns if isinstance(each.type, UTCDateTime)]
        moved = [
            f"{column.name} = strftime('%Y-%m-%d %H:%M:%f', {column.name}, :by) || '000'"
            if sqlite
            else f"{column.name} = {column.name} + CAST(:by AS interval)"
            for column in columns
        ]
        statement = text(f"UPDATE {kind.__tablename__} SET {', '.join(moved)}")
        session.execute(statement, {"by": f"{seconds:+.3f} seconds"})
