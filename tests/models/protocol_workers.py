"""Rules of the model of the protocol: workers, and the messages that reach them."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from models import groups, jobs
from models.outcomes import (
    Cancelled,
    Claim,
    Expired,
    Failed,
    HandedBack,
    Outcome,
    QueuedJob,
    Renewed,
    Succeeded,
    Transition,
    Work,
)
from models.tables import Job
from tests.models.protocol_calls import Fate, Reply
from tests.models.protocol_state import Row, answer_of, must_run_alone
from tests.models.protocol_world import (
    BACKOFF,
    FATES,
    LEASE,
    MANY,
    PICKS,
    RARELY,
    WORKERS,
    Run,
    World,
    check_counts,
    step,
)
from visq.errors import EngineCrashed, ImageFetchFailed, ImageNotFound
from visq.types import JobResult, Lane, Message, Usage
from visq.types import JobStatus as S

ENDS: dict[str, Outcome] = {
    "crash": Failed(EngineCrashed("the engine died"), 0.0),
    "passing": Failed(ImageFetchFailed("the store is slow"), BACKOFF),
    "lasting": Failed(ImageNotFound("s3://a-bucket/cat.png does not exist")),
    "cancelled": Cancelled(),
    "expired": Expired(),
    "handed back": HandedBack("the worker shut down"),
}
HOW = st.sampled_from([*["answer"] * 3, *["crash"] * 2, *["lasting"], *list(ENDS)])


class WorkerRules(World):
    """What workers do, and what the broker does to their messages."""

    @step(8, pick=PICKS, worker=WORKERS, again=RARELY, mistaken=RARELY, fate=FATES)
    def receive(self, pick: int, worker: str, again: bool, mistaken: bool, fate: Fate) -> None:
        """A message arrives, out of order; it may come `again`, or be taken for another kind."""
        message = self.one_of(self.messages(), pick)
        if not again and message in self.broker:
            self.broker.remove(message)
        self.claim(worker, message.id, message.alone != mistaken, fate)

    @step(4, picks=MANY, worker=WORKERS, fate=FATES)
    def receive_together(self, picks: list[int], worker: str, fate: Fate) -> None:
        """Messages are claimed in a group, and what it leaves out one by one."""
        taken = [self.one_of(self.messages(), pick) for pick in picks]
        self.broker = [message for message in self.broker if message not in taken]
        self.claim_together(worker, taken, fate)

    def messages(self) -> list[QueuedJob]:
        """What the broker may hand out: what it has, or else (a rule that makes examples denser)
        what it would have if everybody had published at once."""
        queued = [row for row in self.rows if row.status is S.QUEUED]
        return self.broker or [
            QueuedJob(row.id, Lane(row.lane), must_run_alone(row)) for row in queued
        ]

    def claim_together(self, worker: str, taken: list[QueuedJob], fate: Fate) -> None:
        together = list({message.id for message in taken if not message.alone})
        left_out: list[str] = []

        def told(reply: Reply[dict[str, Work | None]]) -> None:
            works = reply.expected()
            self.saw(f"{worker} claims {[self.name(id_) for id_ in together]} together", reply)
            for job_id in together:
                if job_id in works:
                    self.claimed(worker, job_id, works[job_id], reply, foretold.get(job_id))
                elif reply.direct:
                    assert not foretold[job_id], f"{self.name(job_id)} was left out"
            left_out.extend(id_ for id_ in together if id_ not in works and reply.heard)

        if together:
            together.sort(key=self.ids("job").index)
            foretold = {job_id: self.claimable(job_id, alone=False) for job_id in together}
            self.calls.call(
                fate, told, groups.claim_all, together, worker=worker, lease_seconds=LEASE
            )
        for message in taken:
            if message.alone:
                self.claim(worker, message.id, True, fate)
        for job_id in left_out:
            self.claim(worker, job_id, False, Fate.DONE)

    def claim(self, worker: str, job_id: str, alone: bool, fate: Fate) -> None:
        foretold = self.claimable(job_id, alone=alone)

        def told(reply: Reply[Work]) -> None:
            how = "alone" if alone else "among others"
            self.saw(f"{worker} claims {self.name(job_id)} {how}: {bool(reply.value)}", reply)
            assert reply.error is None, reply.error
            self.claimed(worker, job_id, reply.value, reply, foretold)

        self.calls.call(
            fate, told, jobs.claim, job_id, worker=worker, lease_seconds=LEASE, alone=alone
        )

    def claimed(
        self,
        worker: str,
        job_id: str,
        work: Work | None,
        reply: Reply[object],
        foretold: bool | None,
    ) -> None:
        """Whether the job was there to claim, and all that a run needs of it."""
        name = self.name(job_id)
        if reply.certain:
            assert (work is not None) == foretold, f"claim of {name}: {work}"
        if work is None:
            return
        claim = (work.claim.job_id, work.claim.attempt)
        assert claim not in self.claims, f"{name}, attempt {claim[1]} was claimed twice"
        if reply.certain:
            before = reply.before.jobs[job_id]
            assert claim == (job_id, before.attempt + 1), f"{name}: {claim}"
            assert work.prompt.prompt == before.request["prompt"]
            if work.claim.session_id is not None:
                past = reply.before.messages(work.claim.session_id)
                expected = [(row.role, row.content[0]["text"]) for row in past]
                seen = [(each.message.role, _text(each.message)) for each in work.history]
                assert seen == expected, f"{name} sees {seen}, not {expected}"
        if reply.committed:
            self.claims.add(claim)
        if reply.heard:
            self.runs.append(Run(worker, work))

    @step(4, pick=PICKS, deaf=st.booleans(), fate=FATES)
    def heartbeat(self, pick: int, deaf: bool, fate: Fate) -> None:
        """A worker renews its leases, and stops the runs that have lost theirs unless it is
        `deaf`: too slow to stop them before they write."""
        worker = self.one_of(self.runs, pick).worker
        mine = {run.work.claim.job_id: run for run in self.runs if run.worker == worker}
        held = [run for run in mine.values() if self.owns(run)]

        def told(reply: Reply[list[Renewed]]) -> None:
            renewed = {each.claim for each in reply.expected()}
            self.saw(f"{worker} renews {[self.name(id_) for id_ in mine]}", reply)
            if reply.certain:
                assert renewed == {run.work.claim for run in held}, f"renewed: {renewed}"
            if reply.direct:
                changed = reply.before.changed(Job, reply.after)
                others = changed - {claim.job_id for claim in renewed}
                named = sorted(map(self.name, others))
                assert not others, f"{worker} has lost {named}, and renewed another's lease"
            if reply.heard and not deaf:
                lost = [run for run in mine.values() if run.work.claim not in renewed]
                self.runs = [run for run in self.runs if run not in lost]

        claims = [run.work.claim for run in mine.values()]
        self.calls.call(fate, told, jobs.renew, claims, lease_seconds=LEASE)

    @step(8, pick=PICKS, how=HOW, fate=FATES)
    def finish(self, pick: int, how: str, fate: Fate) -> None:
        """A run ends. If its worker does not hear so, it says the same again later."""
        self.say_end(self.one_of(self.runs, pick), how, fate)

    @step(4, pick=PICKS, how=HOW, fate=FATES)
    def finish_too_late(self, pick: int, how: str, fate: Fate) -> None:
        """As `finish`, of a run that has lost its job."""
        self.say_end(self.one_of([run for run in self.runs if not self.owns(run)], pick), how, fate)

    def say_end(self, run: Run, how: str, fate: Fate) -> None:
        if run.outcome is None:
            run.outcome = answered(run.work) if how == "answer" else ENDS[how]
        self.end(run, run.outcome, fate)

    def end(self, run: Run, outcome: Outcome, fate: Fate) -> None:
        self.runs.remove(run)
        claim, owned = run.work.claim, self.owns(run)
        name = f"{self.name(claim.job_id)}, attempt {claim.attempt}"

        def told(reply: Reply[Transition]) -> None:
            still = "its own" if owned else "which it has lost"
            self.saw(f"{run.worker} ends {name}, {still}, with {type(outcome).__name__}", reply)
            assert reply.error is None, reply.error
            if reply.certain:
                assert (reply.value is not None) == owned, f"{name} ended, its own: {owned}"
            if reply.value is not None:
                if reply.certain:
                    check_end(name, reply.before.jobs[claim.job_id], reply.value.job, outcome)
                if reply.committed:
                    self.made(reply.value, reply)
            if not reply.heard:
                self.runs.append(run)

        self.calls.call(fate, told, jobs.finish, claim, outcome)

    @step(3, picks=MANY, fate=FATES)
    def succeed_together(self, picks: list[int], fate: Fate) -> None:
        """Runs succeed in a group, lost ones among them; what it leaves out ends alone."""
        self.end_together([self.one_of(self.runs, pick) for pick in picks], fate)

    def end_together(self, runs: Sequence[Run], fate: Fate) -> None:
        ends: dict[Run, Succeeded] = {}
        for run in runs:
            outcome = run.outcome or answered(run.work)
            if isinstance(outcome, Succeeded):
                run.outcome = ends[run] = outcome
        if not ends:
            return
        owned = {run for run in ends if self.owns(run)}
        self.runs = [run for run in self.runs if run not in ends]
        left_out: list[Run] = []

        def told(reply: Reply[dict[Claim, Transition | None]]) -> None:
            answers = reply.expected()
            named = [f"{self.name(c.job_id)}, attempt {c.attempt}" for c in _claims(ends)]
            self.saw(f"succeed together: {named}", reply)
            for run in ends:
                claim = run.work.claim
                if claim in answers:
                    ended = answers[claim] is not None
                    assert not reply.certain or ended == (run in owned), f"{named}: {answers}"
                else:
                    assert not reply.direct or run not in owned, f"{named}: {claim} is left out"
                    left_out.extend([run] if reply.heard else [])
                if not reply.heard or claim not in answers:
                    self.runs.append(run)
            if reply.committed:
                done = [answer for answer in answers.values() if answer is not None]
                others = [id_ for each in done for id_ in (each.job.id, *_queued(each))]
                for each in done:
                    self.made(each, reply, *others)

        given = [(run.work.claim, outcome) for run, outcome in ends.items()]
        self.calls.call(fate, told, groups.succeed_all, given)
        for run in left_out:
            self.end(run, ends[run], Fate.DONE)

    @step(1, worker=WORKERS)
    def worker_dies(self, worker: str) -> None:
        self.runs = [run for run in self.runs if run.worker != worker]

    @step(1, pick=PICKS)
    def lose_a_message(self, pick: int) -> None:
        self.broker.remove(self.one_of(self.broker, pick))

    @step(1)
    def lose_all_messages(self) -> None:
        self.broker.clear()

    @step(1, pick=PICKS, alone=st.booleans())
    def repeat_an_old_message(self, pick: int, alone: bool) -> None:
        """A message of any job, at any time of its life."""
        job = self.one_of(self.rows, pick)
        self.say(f"of {self.name(job.id)}")
        self.broker.append(QueuedJob(job.id, Lane(job.lane), alone))


def answered(work: Work) -> Succeeded:
    text = answer_of(work.claim.job_id, work.claim.attempt)
    result = JobResult(text=text, finish_reason="stop", usage=Usage(), model="small")
    answer = Message(role="assistant", content=text)
    return Succeeded(result, [*work.prompt.as_messages(), answer], [1, 2, 3], "tokenizer-1")


def check_end(name: str, before: Row, after: Job, outcome: Outcome) -> None:
    """The state to which this outcome leads, and what it costs."""
    stopped = before.cancel_requested_at is not None
    failed = crashed = 0
    dead = False
    match outcome:
        case Succeeded():
            expected = S.SUCCEEDED
        case Failed(error) if not error.retryable:
            expected, failed = S.FAILED, 1
        case Failed() if stopped:
            expected = S.CANCELLED
        case Failed(error):
            expected, failed, crashed = after_failure(before, isinstance(error, EngineCrashed))
            dead = expected is S.FAILED
        case HandedBack():
            expected = S.CANCELLED if stopped else S.QUEUED
        case Cancelled():
            expected = S.CANCELLED
        case Expired():
            expected = S.EXPIRED
    assert after.status is expected, f"{name} is {after.status}, not {expected}"
    assert (after.dead_at is not None) == dead, f"{name} died at {after.dead_at}"
    check_counts(name, before, after, failed=failed, crashed=crashed)


def after_failure(before: Row, crash: bool) -> tuple[S, int, int]:
    """State, failures and crashes that follow from a failure that may pass: the first crashes of a
    job that was among others cost it nothing."""
    if crash and not must_run_alone(before):
        return S.QUEUED, 0, 1
    if before.failures + 1 < before.max_attempts:
        return S.QUEUED, 1, int(crash)
    return S.FAILED, 1, 0


def _text(message: Message) -> str:
    return "".join(getattr(part, "text", "") for part in message.parts())


def _claims(ends: dict[Run, Succeeded]) -> list[Claim]:
    return [run.work.claim for run in ends]


def _queued(transition: Transition) -> list[str]:
    return [job.id for job in transition.queued]
