"""Rules of the model of the protocol: what clients ask of an API."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from models import batches, jobs, sessions, submit
from models.batches import BatchTransition
from models.outcomes import Transition
from models.submit import SubmittedBatch, SubmittedJob
from models.tables import ChatSession
from tests.models.protocol_calls import Fate, Reply, differences
from tests.models.protocol_state import Row
from tests.models.protocol_world import (
    DEADLINE,
    FATES,
    MOST_JOBS,
    PICKS,
    RARELY,
    NothingError,
    Parcel,
    World,
    step,
)
from visq.errors import IdempotencyConflict, InvalidRequest, NotFound, NotRetriable, VisqError
from visq.types import BatchRequest, BatchStatus, JobRequest
from visq.types import JobStatus as S

KEYS = st.sampled_from([None, None, "key 1", "key 2"])
SESSIONS = st.sampled_from(["none", "new", "old", "old", "old"])
ATTEMPTS = st.integers(1, 3)
PENDING = (S.WAITING, S.QUEUED)


class ClientRules(World):
    """What clients do. After an answer that was lost they may send the same again."""

    @step(
        8,
        key=KEYS,
        session=SESSIONS,
        pick=PICKS,
        deadline=RARELY,
        attempts=ATTEMPTS,
        other_body=RARELY,
        fate=FATES,
    )
    def submit(
        self,
        key: str | None,
        session: str,
        pick: int,
        deadline: bool,
        attempts: int,
        other_body: bool,
        fate: Fate,
    ) -> None:
        """A job, or a turn of a session; with a key that was used before, the same body again."""
        if len(self.rows) >= MOST_JOBS:
            raise NothingError
        known = self.ids("session")
        request = None if key is None or other_body else self.client.jobs.get(key)
        if request is None:
            self.client.submitted += 1
            request = JobRequest.model_validate(
                {
                    "prompt": f"question {self.client.submitted}",
                    "expires_in": DEADLINE if deadline else None,
                    "session": {} if session == "new" else None,
                    "session_id": self.one_of(known, pick) if session == "old" and known else None,
                    "result_queue": "mine" if pick % 2 else None,
                }
            )
        if key is not None:
            self.client.jobs.setdefault(key, request)
        self.send(request, key, attempts, fate)

    def send(self, request: JobRequest, key: str | None, attempts: int, fate: Fate) -> None:
        fingerprint = submit.body_fingerprint(request)
        state = self.calls.state
        first = _by_key(state.jobs.values(), key)
        origin = state.sessions[request.session_id] if request.session_id else None
        turns = state.turns().get(request.session_id or "", [])
        waits = any(not job.status.is_terminal for job in turns)

        def told(reply: Reply[SubmittedJob]) -> None:
            self.saw(f"submit with {key}, session {self.name(request.session_id or '')}", reply)
            if reply.certain and first is not None:
                check_repeat(reply, first, fingerprint)
            elif reply.certain and origin is not None and origin.deleted_at is not None:
                assert isinstance(reply.error, NotFound), reply
            elif reply.certain:
                submitted = reply.expected()
                assert submitted.created
                assert submitted.job.status is (S.WAITING if waits else S.QUEUED), submitted
                assert submitted.job.turn == (origin.turns + 1 if origin else _first(request))
            assert reply.value or isinstance(reply.error, (NotFound, IdempotencyConflict)), reply
            if reply.value is not None and reply.heard and reply.value.queued:
                self.parcels.append(Parcel(reply.value.queued))

        self.calls.call(
            fate,
            told,
            submit.submit_job,
            self.tenant_id,
            request,
            max_attempts=attempts,
            idempotency_key=key,
            fingerprint=fingerprint,
            for_tenant=True,
        )

    @step(2, key=KEYS, size=st.integers(1, 4), deadline=RARELY, attempts=ATTEMPTS, fate=FATES)
    def submit_batch(
        self, key: str | None, size: int, deadline: bool, attempts: int, fate: Fate
    ) -> None:
        """A batch; with a key that was used before, the same body again."""
        if len(self.rows) >= MOST_JOBS:
            raise NothingError
        request = None if key is None else self.client.batches.get(key)
        if request is None:
            self.client.submitted += 1
            items = [
                {"custom_id": f"{place}", "prompt": f"item {self.client.submitted}.{place}"}
                for place in range(size)
            ]
            body = {"items": items, "expires_in": DEADLINE if deadline else None}
            request = BatchRequest.model_validate(body)
        if key is not None:
            self.client.batches.setdefault(key, request)
        self.send_batch(request, key, attempts, fate)

    def send_batch(self, request: BatchRequest, key: str | None, attempts: int, fate: Fate) -> None:
        fingerprint = submit.body_fingerprint(request)
        first = _by_key(self.calls.state.batches.values(), key)

        def told(reply: Reply[SubmittedBatch]) -> None:
            self.saw(f"submit a batch of {len(request.items)} with {key}", reply)
            submitted = reply.expected()
            if reply.certain and first is not None:
                check_repeat(reply, first, fingerprint)
            elif reply.certain:
                assert submitted.created
                assert submitted.batch.status is BatchStatus.IN_PROGRESS

        self.calls.call(
            fate,
            told,
            submit.submit_batch,
            self.tenant_id,
            request,
            max_attempts=attempts,
            idempotency_key=key,
            fingerprint=fingerprint,
            for_tenant=True,
        )

    @step(2, pick=PICKS, fate=FATES)
    def cancel(self, pick: int, fate: Fate) -> None:
        self.ask_to_cancel(self.one_of(self.rows, pick).id, fate, for_tenant=True)

    def ask_to_cancel(self, job_id: str, fate: Fate, *, for_tenant: bool) -> None:
        before = self.calls.state.jobs[job_id]

        def told(reply: Reply[Transition]) -> None:
            self.saw(f"cancel {self.name(job_id)}, {before.status}", reply)
            transition = reply.expected()
            if reply.certain:
                expected = S.CANCELLED if before.status in PENDING else before.status
                assert transition.job.status is expected, transition.job.status
            if reply.direct and reply.committed:
                after = reply.after.jobs[job_id]
                asked = after.cancel_requested_at is not None
                assert asked or before.status is not S.RUNNING, f"{self.name(job_id)} runs on"
                if before.status.is_terminal:
                    assert not differences(reply.before, reply.after)
            if reply.committed:
                self.made(transition, reply)

        self.calls.call(fate, told, jobs.cancel, job_id, for_tenant=for_tenant)

    @step(3, pick=PICKS, fate=FATES)
    def retry(self, pick: int, fate: Fate) -> None:
        """Of a failed job, or (rarely) of another one."""
        failed = [row for row in self.rows if row.status is S.FAILED]
        row = self.one_of(failed if pick % 8 else self.rows, pick)
        refused = self.why_not_retried(row)

        def told(reply: Reply[Transition]) -> None:
            self.saw(f"retry {self.name(row.id)}, {row.status}", reply)
            if reply.certain:
                assert type(reply.error) is (refused or type(None)), f"{refused}: {reply.error}"
            if reply.value is None:
                assert isinstance(reply.error, (NotFound, NotRetriable)), reply.error
                return
            job = reply.value.job
            assert (job.status, job.failures, job.dead_at) == (S.QUEUED, 0, None)
            given = self.calls.ledger.given[job.id]
            assert (job.expires_at is None) == (given is None)
            if reply.direct and given is not None and job.expires_at is not None:
                left = job.expires_at - reply.before.now
                wrong = abs((left - given).total_seconds()) > 5
                assert not wrong, f"{self.name(job.id)} was given {given}, and has {left} again"
            if reply.committed:
                self.made(reply.value, reply)

        self.calls.call(fate, told, jobs.retry, row.id, for_tenant=True)

    def why_not_retried(self, row: Row) -> type[VisqError] | None:
        state = self.calls.state
        if row.status is not S.FAILED:
            return NotRetriable
        if row.session_id is not None:
            session = state.sessions[row.session_id]
            if session.deleted_at is not None:
                return NotFound
            if session.turns != row.turn:
                return NotRetriable
        if row.batch_id is not None:
            cancelling = state.batches[row.batch_id].status is BatchStatus.CANCELLING
            return NotRetriable if cancelling else None
        return None

    @step(1, pick=PICKS, fate=FATES)
    def delete_session(self, pick: int, fate: Fate) -> None:
        session_id = self.one_of(self.ids("session"), pick)
        was_deleted = self.calls.state.sessions[session_id].deleted_at is not None

        def told(reply: Reply[list[Transition]]) -> None:
            self.saw(f"delete {self.name(session_id)}", reply)
            if reply.certain and was_deleted:
                assert isinstance(reply.error, NotFound), reply
            assert reply.value is not None or isinstance(reply.error, NotFound), reply.error
            if reply.direct and reply.committed:
                for job in reply.after.turns().get(session_id, []):
                    stopping = job.status is S.RUNNING and job.cancel_requested_at is not None
                    assert job.status.is_terminal or stopping, f"{self.name(job.id)} goes on"
            if reply.value is not None and reply.heard:
                self.keep(*reply.value)

        self.calls.call(fate, told, jobs.delete_session, session_id, for_tenant=True)

    @step(1, pick=PICKS, at_turn=st.none() | st.integers(0, 4), fate=FATES)
    def fork(self, pick: int, at_turn: int | None, fate: Fate) -> None:
        session_id = self.one_of(self.ids("session"), pick)
        origin = self.calls.state.sessions[session_id]
        past = self.calls.state.messages(session_id)
        last = max((row.turn for row in past), default=0)

        def told(reply: Reply[ChatSession]) -> None:
            self.saw(f"fork {self.name(session_id)} at {at_turn}", reply)
            if reply.certain and origin.deleted_at is not None:
                assert isinstance(reply.error, NotFound), reply
            elif reply.certain and at_turn is not None and at_turn > last:
                assert isinstance(reply.error, InvalidRequest), reply
            elif reply.direct:
                copy = reply.expected()
                if reply.committed:
                    copied = [_said(row) for row in reply.after.messages(copy.id)]
                    until = last if at_turn is None else at_turn
                    assert copied == [_said(row) for row in past if row.turn <= until], copied
            assert reply.value or isinstance(reply.error, (NotFound, InvalidRequest)), reply.error

        self.calls.call(fate, told, sessions.fork, session_id, at_turn, for_tenant=True)

    @step(1, pick=PICKS, fate=FATES)
    def cancel_batch(self, pick: int, fate: Fate) -> None:
        batch_id = self.one_of(self.ids("batch"), pick)
        before = self.calls.state.batches[batch_id].status

        def told(reply: Reply[BatchTransition]) -> None:
            self.saw(f"cancel {self.name(batch_id)}", reply)
            running = before is BatchStatus.IN_PROGRESS
            status = reply.expected().batch.status
            if reply.certain:
                assert status is (BatchStatus.CANCELLING if running else before), status
            if reply.direct and not running:
                assert not differences(reply.before, reply.after)

        self.calls.call(fate, told, batches.request_cancel, batch_id, for_tenant=True)


def check_repeat(
    reply: Reply[SubmittedJob] | Reply[SubmittedBatch], first: Row, fingerprint: str
) -> None:
    """A key that was used before: the first one again, or a refusal; in no case a second one."""
    if reply.direct:
        assert not differences(reply.before, reply.after)
    if first.idempotency_hash != fingerprint:
        assert isinstance(reply.error, IdempotencyConflict), reply
        return
    submitted: Any = reply.expected()
    again = submitted.job if isinstance(submitted, SubmittedJob) else submitted.batch
    assert (again.id, submitted.created) == (first.id, False), again


def _by_key(rows: Any, key: str | None) -> Row | None:
    found = [row for row in rows if key is not None and row.idempotency_key == key]
    assert len(found) <= 1, f"{key} has made {len(found)}"
    return found[0] if found else None


def _first(request: JobRequest) -> int | None:
    """The turn of a job that continues no session."""
    return None if request.session is None else 1


def _said(row: Row) -> tuple[Any, ...]:
    return (row.turn, row.position, row.role, row.content, row.token_ids, row.tokenizer)
