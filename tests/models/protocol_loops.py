"""Rules of the model of the protocol: the maintenance loop, whoever publishes after a commit, and
the time that passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from models import batch_windows, batches, dispatch, jobs, leases, outbox
from models.dispatch import DueJob
from models.outbox import OutboxEntry
from models.outcomes import Transition
from tests.models.protocol_calls import Fate, Reply, differences
from tests.models.protocol_clients import PENDING, ClientRules
from tests.models.protocol_state import Row, Snapshot, must_run_alone
from tests.models.protocol_workers import WorkerRules, after_failure
from tests.models.protocol_world import (
    BACKOFF,
    FATES,
    LATER,
    NAMES,
    PICKS,
    REPUBLISH,
    WINDOW,
    Parcel,
    check_counts,
    step,
)
from visq.types import BatchStatus
from visq.types import JobStatus as S

BACKOFFS = st.sampled_from([0.0, 0.0, BACKOFF])
LIMITS = st.sampled_from([1, 2, 200])
BROKER = st.sampled_from(["takes them", "takes them", "is away", "never gets them"])
FAR = st.sampled_from(["done", "done", "not noted", "not published"])


class LoopRules(WorkerRules, ClientRules):
    """What loops do, each step of which may be its process's last."""

    @step(4, seconds=st.sampled_from(LATER))
    def time_passes(self, seconds: float) -> None:
        self.calls.pass_time(seconds)

    @step(1, limit=LIMITS, fate=FATES)
    def expire(self, limit: int, fate: Fate) -> None:
        """Deadlines of waiting and queued jobs."""
        state = self.calls.state
        due = {row.id for row in self.rows if row.status in PENDING and _past(row, state)}
        for job_id in self.found(jobs.past_deadline, limit, due):
            self.expire_one(job_id, fate)

    @step(3, limit=LIMITS, backoff=BACKOFFS, fate=FATES)
    def rescue(self, limit: int, backoff: float, fate: Fate) -> None:
        """Jobs whose lease ran out."""
        state = self.calls.state
        due = {row.id for row in self.rows if _leaseless(row, state)}
        for job_id in self.found(leases.without_lease, limit, due):
            self.take_from_the_dead(job_id, backoff, fate)

    @step(6, pick=PICKS, backoff=BACKOFFS, elsewhere=st.booleans(), fate=FATES)
    def stall(self, pick: int, backoff: float, elsewhere: bool, fate: Fate) -> None:
        """A worker has not renewed the lease of a run for too long, and its job is taken from it;
        it does not know. The job may go on `elsewhere` at once."""
        run = self.one_of([run for run in self.runs if self.owns(run)], pick)
        job_id = run.work.claim.job_id
        self.calls.let_lease_run_out(job_id)
        self.take_from_the_dead(job_id, backoff, fate)
        if elsewhere:
            worker = self.one_of([name for name in NAMES if name != run.worker], pick)
            self.claim(worker, job_id, must_run_alone(self.calls.state.jobs[job_id]), Fate.DONE)

    @step(1, pick=PICKS, fate=FATES)
    def rescue_late(self, pick: int, fate: Fate) -> None:
        """Another loop has looked before: the job may be anywhere by now."""
        self.take_from_the_dead(self.one_of(self.rows, pick).id, BACKOFF, fate)

    @step(1, pick=PICKS, fate=FATES)
    def expire_late(self, pick: int, fate: Fate) -> None:
        self.expire_one(self.one_of(self.rows, pick).id, fate)

    def expire_one(self, job_id: str, fate: Fate) -> None:
        state = self.calls.state
        due = state.jobs[job_id].status in PENDING and _past(state.jobs[job_id], state)
        self.transition(jobs.expire, job_id, fate, S.EXPIRED if due else None)

    def take_from_the_dead(self, job_id: str, backoff: float, fate: Fate) -> None:
        row, state = self.calls.state.jobs[job_id], self.calls.state
        expected: S | None = None
        failed = crashed = 0
        if _leaseless(row, state):
            if row.cancel_requested_at is not None:
                expected = S.CANCELLED
            elif _past(row, state):
                expected = S.EXPIRED
            else:
                expected, failed, crashed = after_failure(row, crash=True)

        def counted(after: Any) -> None:
            check_counts(self.name(job_id), row, after, failed=failed, crashed=crashed)
            assert (after.dead_at is not None) == (after.status is S.FAILED), after.dead_at

        self.transition(leases.rescue, job_id, fate, expected, counted, backoff_seconds=backoff)

    def transition(
        self,
        function: Callable[..., Transition | None],
        job_id: str,
        fate: Fate,
        expected: S | None,
        also: Callable[[Any], None] = lambda job: None,
        **kwargs: Any,
    ) -> None:
        """A transition that leads to this state, or that there is no reason for."""

        def told(reply: Reply[Transition | None]) -> None:
            self.saw(f"{function.__name__} {self.name(job_id)}", reply)
            assert reply.error is None, reply.error
            to = None if reply.value is None else reply.value.job.status
            if reply.certain:
                assert to is expected, f"{self.name(job_id)} is {to}, not {expected}"
            if reply.value is not None:
                if reply.certain:
                    also(reply.value.job)
                if reply.committed:
                    self.made(reply.value, reply)

        self.calls.call(fate, told, function, job_id, **kwargs)

    def found(
        self, function: Callable[..., list[str]], limit: int, expected: set[str]
    ) -> Sequence[str]:
        """What the loop reads, at most `limit` of those that are due."""
        found = self.calls.database.read(function, limit)
        assert set(found) <= expected, f"{function.__name__}: {list(map(self.name, found))}"
        assert len(found) == min(limit, len(expected)), f"{function.__name__} overlooks some"
        return sorted(found, key=self.ids("job").index)

    @step(2, limit=LIMITS, fate=FATES)
    def cancel_batch_items(self, limit: int, fate: Fate) -> None:
        """Items of batches that are being cancelled."""
        state = self.calls.state
        due = {
            row.id
            for row in self.rows
            if row.batch_id is not None
            and state.batches[row.batch_id].status is BatchStatus.CANCELLING
            and row.status in (S.QUEUED, S.RUNNING)
            and row.cancel_requested_at is None
        }
        for job_id in self.found(batches.to_cancel, limit, due):
            self.ask_to_cancel(job_id, fate, for_tenant=False)

    @step(2, fate=FATES)
    def fill_windows(self, fate: Fate) -> None:
        """Items enter the broker in order, as many as there is room for."""
        expected = _next_in_windows(self.calls.state)

        def told(reply: Reply[int]) -> None:
            self.saw(f"fill windows: {reply.value}", reply)
            filled = reply.expected()
            if not reply.direct:
                return
            assert filled == len(expected), f"{filled} were let in, not {len(expected)}"
            if reply.committed:
                changed = differences(reply.before, reply.after)
                assert changed == expected, [self.name(id_) for id_ in changed]

        self.calls.call(fate, told, batch_windows.fill_windows, WINDOW)

    @step(3, limit=LIMITS, broker=BROKER, fate=FATES)
    def publish_due(self, limit: int, broker: str, fate: Fate) -> None:
        """Queued jobs go to the broker, which may not get them."""
        if any(row.batch_id is not None for row in self.rows):
            self.calls.let_a_moment_pass()
        state = self.calls.state
        queued = [row for row in self.rows if row.publish_at is not None]
        due = {row.id for row in queued if row.publish_at <= state.now}
        reserved: list[DueJob] = []

        def told(reply: Reply[list[DueJob]]) -> None:
            answer = reply.value or []
            found = [each.job.id for each in answer]
            named = [self.name(id_) for id_ in found]
            self.saw(f"the broker {broker}: {named}", reply)
            if reply.certain:
                assert set(found) <= due, f"{named} are not all due"
            if reply.direct:
                assert len(found) == min(limit, len(due)), f"only {named} of {len(due)} are due"
            if reply.heard and broker == "takes them":
                self.broker.extend(each.job for each in answer)
            if reply.heard and broker == "is away":
                reserved.extend(answer)

        self.calls.call(fate, told, dispatch.reserve_due, limit=limit, republish_seconds=REPUBLISH)
        if reserved:
            ids = [each.job.id for each in reserved]
            self.calls.call(fate, lambda reply: None, dispatch.publish_again_now, ids, seconds=5.0)

    @step(2, limit=LIMITS, far=FAR, fate=FATES)
    def publish_events(self, limit: int, far: str, fate: Fate) -> None:
        """Entries of the outbox that nobody has published."""
        state = self.calls.state
        due = {row.id for row in state.outbox.values() if row.available_at <= state.now}
        reserved: list[OutboxEntry] = []

        def told(reply: Reply[list[OutboxEntry]]) -> None:
            answer = reply.value or []
            found = [each.id for each in answer]
            self.saw(f"publish {[self.name(id_) for id_ in found]}, {far}", reply)
            if reply.certain:
                assert set(found) <= due, found
            if reply.direct:
                assert len(found) == min(limit, len(due)), f"{len(due)} are due"
            if reply.heard:
                reserved.extend(answer)

        self.calls.call(fate, told, outbox.reserve, limit)
        self.tell_the_world(reserved, far, fate)

    @step(8, pick=PICKS, messages=FAR, events=FAR, fate=FATES)
    def deliver(self, pick: int, messages: str, events: str, fate: Fate) -> None:
        """Whoever made a transition publishes what it left, as far as it comes."""
        parcel: Parcel = self.one_of(self.parcels, pick)
        self.parcels.remove(parcel)
        named = [self.name(each.id) for each in (*parcel.queued, *parcel.events)]
        self.say(f"deliver {named}")
        if parcel.queued and messages != "not published":
            self.broker.extend(parcel.queued)
            if messages == "done":
                self.calls.call(
                    fate,
                    lambda reply: None,
                    dispatch.mark_published,
                    [job.id for job in parcel.queued],
                    republish_seconds=REPUBLISH,
                )
        self.tell_the_world(parcel.events, events, fate)

    def tell_the_world(self, entries: Sequence[OutboxEntry], far: str, fate: Fate) -> None:
        """Publish events; an event may come more than once, but always the same."""
        if not entries or far == "not published":
            return
        ledger = self.calls.ledger
        for entry in entries:
            same = entry.payload == ledger.payloads[entry.id]
            assert same, f"{self.name(entry.id)} is not what is in the outbox"
            ledger.told[entry.id] = ledger.told.get(entry.id, 0) + 1
        if far == "done":
            ids = [entry.id for entry in entries]
            self.calls.call(fate, lambda reply: None, outbox.done, ids)


def _past(row: Row, state: Snapshot) -> bool:
    return row.expires_at is not None and row.expires_at <= state.now


def _leaseless(row: Row, state: Snapshot) -> bool:
    return row.status is S.RUNNING and row.lease_expires_at <= state.now


def _next_in_windows(state: Snapshot) -> set[str]:
    """Items that must be let into the broker now: turn by turn, that of the batch with the fewest
    items in flight."""
    held: dict[str, list[str]] = {}
    in_flight: dict[str, int] = {}
    for batch_id, items in state.items().items():
        queued = [item for item in items if item.status is S.QUEUED]
        waits = [item.id for item in queued if item.publish_at is None]
        running = sum(item.status is S.RUNNING for item in items)
        in_flight[batch_id] = len(queued) - len(waits) + running
        if state.batches[batch_id].status is BatchStatus.IN_PROGRESS:
            held[batch_id] = waits
    following: set[str] = set()
    while sum(in_flight.values()) < WINDOW and any(held.values()):
        batch_id = min((in_flight[each], each) for each in held if held[each])[1]
        following.add(held[batch_id].pop(0))
        in_flight[batch_id] += 1
    return following
