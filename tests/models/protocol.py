"""The protocol of jobs, leases, outbox and sessions, as a machine that hypothesis drives.

The machine calls the real functions of `models/`, one transaction at a time, as clients, workers
and maintenance loops would in any order: messages come late, twice, or never; workers die, or go on
after they have lost their lease; transactions are rolled back at their end, or committed without
their caller hearing of it, or (PostgreSQL) overlap. After each transaction
`tests.models.protocol_state.check` looks at everything that was committed; at the end of each
example all faults stop, and every job that was accepted must come to its end.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.models.protocol_calls import Fate
from tests.models.protocol_loops import LoopRules
from tests.models.protocol_workers import answered
from tests.models.protocol_world import STEPS, NothingError, Parcel, Step

ROUNDS = 60
"""Rounds without faults after which everything must be at rest. A job may have three attempts and
two crashes behind it or before it, and a session some turns; each needs a round."""


class Protocol(LoopRules):
    """All rules together."""

    @rule(step=st.sampled_from(STEPS).flatmap(lambda drawn: drawn))
    def do(self, step: Step) -> None:
        self.sound = False
        try:
            getattr(self, step.action)(**step.arguments)
            type(self).steps += 1
        except NothingError:
            pass
        self.sound = True

    def teardown(self) -> None:
        try:
            if self.sound:
                self.come_to_rest()
        finally:
            self.calls.abandon()
            type(self).jobs_seen += len(self.ids("job"))

    def come_to_rest(self) -> None:
        """No more faults: clients repeat what they did not hear of, workers do all there is."""
        self.say("no more faults")
        self.calls.end_held()
        for key, request in self.client.jobs.items():
            self.send(request, key, 3, Fate.DONE)
        for key, batch in self.client.batches.items():
            self.send_batch(batch, key, 3, Fate.DONE)
        for _ in range(ROUNDS):
            if self.at_rest():
                break
            self.work()
            self.calls.pass_time(700.0)
        state = self.calls.state
        for row in self.rows:
            assert row.status.is_terminal, f"{self.name(row.id)} is {row.status} for ever"
        for entry in state.outbox:
            raise AssertionError(f"{self.name(entry)} stays in the outbox")
        for batch in state.batches.values():
            assert batch.finished_at is not None, f"{self.name(batch.id)} has no end"

    def work(self) -> None:
        """One round of the loop, and of the workers."""
        self.expire(200, Fate.DONE)
        self.rescue(200, 0.0, Fate.DONE)
        self.cancel_batch_items(200, Fate.DONE)
        self.fill_windows(Fate.DONE)
        self.publish_due(200, "takes them", Fate.DONE)
        self.publish_events(200, "done", Fate.DONE)
        taken, self.broker = self.broker, []
        self.claim_together("worker A", taken, Fate.DONE)
        self.end_together(list(self.runs), Fate.DONE)
        for run in list(self.runs):
            self.end(run, run.outcome or answered(run.work), Fate.DONE)
        queued = [job for parcel in self.parcels for job in parcel.queued]
        events = [event for parcel in self.parcels for event in parcel.events]
        self.parcels = [Parcel(queued, events)]
        self.deliver(0, "done", "done", Fate.DONE)

    def at_rest(self) -> bool:
        return not self.calls.state.outbox and all(row.status.is_terminal for row in self.rows)
