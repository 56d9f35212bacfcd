"""The world of the model of the protocol: a broker that is a bag of messages, and what clients and
workers know. The rules are in protocol_clients.py, protocol_workers.py and protocol_loops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from models.database import Database
from models.outbox import OutboxEntry
from models.outcomes import Outcome, QueuedJob, Transition, Work
from models.tables import Job
from tests.models.protocol_calls import Calls, Fate, Reply, wipe
from tests.models.protocol_state import Row, must_run_alone
from visq.types import BatchStatus, JobRequest
from visq.types import JobStatus as S

T = TypeVar("T")

# Seconds. None of them is a multiple of seven, and time passes by multiples of seven: nothing is
# ever due just now, so that what is due does not depend on the speed of the test.
LEASE = 600.0
REPUBLISH = 300.0
BACKOFF = 20.0
DEADLINE = 2000.0
LATER = (7.0, 7.0, 70.0, 70.0, 700.0, 3500.0)

MOST_JOBS = 20
"""Of an example: with more, its steps only become slower."""

WINDOW = 2
"""Items of a batch that are in the broker at the same time."""

PICKS = st.integers(0, 60)
"""Which one of several; taken modulo their number."""

MANY = st.lists(PICKS, min_size=1, max_size=4, unique=True)
FATES = st.sampled_from([*[Fate.DONE] * 8, *[Fate.SLOW] * 2, *list(Fate)[1:]])
NAMES = ["worker A", "worker B", "worker C"]
WORKERS = st.sampled_from(NAMES)
RARELY = st.sampled_from([False, False, False, True])


class NothingError(Exception):
    """There is nothing that this step could be done to."""


@dataclass(eq=False)
class Run:
    """A claim in the hands of a worker, which may have lost it without knowing."""

    worker: str
    work: Work
    outcome: Outcome | None = None
    """How it ended; a worker that did not hear of its commit says the same again."""


@dataclass(eq=False)
class Parcel:
    """What is left to publish after a commit, in the hands of whoever made it."""

    queued: Sequence[QueuedJob] = ()
    events: Sequence[OutboxEntry] = ()


@dataclass
class Client:
    """What the clients sent with each ``Idempotency-Key``, so that they can send it again."""

    jobs: dict[str, JobRequest] = field(default_factory=dict)
    batches: dict[str, object] = field(default_factory=dict)
    submitted: int = 0


Action = TypeVar("Action", bound=Callable[..., None])


@dataclass(frozen=True)
class Step:
    """One thing that is done."""

    action: str
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        given = (
            f"{name}={value.name if isinstance(value, Fate) else repr(value)}"
            for name, value in self.arguments.items()
        )
        return f"{self.action}({', '.join(given)})"


STEPS: list[st.SearchStrategy[Step]] = []
"""All that may be done, each as many times as it has weight."""


def step(weight: int, **arguments: st.SearchStrategy[Any]) -> Callable[[Action], Action]:
    """Something that a machine does.

    Not a rule of its own: hypothesis leaves out many of a machine's rules in each example, and a
    job that is accepted but never claimed shows nothing.
    """

    def decorate(action: Action) -> Action:
        drawn = st.builds(Step, st.just(action.__name__), st.fixed_dictionaries(arguments))
        STEPS.extend([drawn] * weight)
        return action

    return decorate


class World(RuleBasedStateMachine):
    """The state, and the words in which rules speak of it."""

    database: ClassVar[Database]
    tenant_id: ClassVar[str]
    steps: ClassVar[int] = 0
    jobs_seen: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.database.run(wipe)
        self.calls = Calls(self.database, self.tenant_id)
        self.broker: list[QueuedJob] = []
        self.parcels: list[Parcel] = []
        self.runs: list[Run] = []
        self.claims: set[tuple[str, int]] = set()
        """(job, attempt) of all claims that were committed."""
        self.client = Client()
        self.sound = True
        """Whether no step has failed."""

    # --- what there is, and what it is called ---

    @property
    def rows(self) -> Sequence[Row]:
        """All jobs, in the order in which they were accepted."""
        return [self.calls.state.jobs[id_] for id_ in self.ids("job")]

    def ids(self, kind: str) -> list[str]:
        """Of all jobs, sessions or batches, in the order of their appearance."""
        return [id_ for id_, name in self.calls.ledger.names.items() if name.startswith(kind)]

    def name(self, id_: str) -> str:
        return self.calls.ledger.name(id_)

    def say(self, what: str) -> None:
        """Shown below the step, if the example fails."""
        note(f"    {what}")

    def saw(self, what: str, reply: Reply[T]) -> None:
        error = reply.error
        how = reply.fate.value if error is None else f"{type(error).__name__}: {error}"
        self.say(f"{what} ({how})")

    @staticmethod
    def one_of(things: Sequence[T], pick: int) -> T:
        if not things:
            raise NothingError
        return things[pick % len(things)]

    # --- what is true ---

    def owns(self, run: Run) -> bool:
        """Whether the run still has its job."""
        row = self.calls.state.jobs.get(run.work.claim.job_id)
        return row is not None and row.status is S.RUNNING and row.attempt == run.work.claim.attempt

    def claimable(self, job_id: str, *, alone: bool) -> bool:
        """Whether a claim must succeed just now."""
        state = self.calls.state
        row = state.jobs[job_id]
        batch = None if row.batch_id is None else state.batches[row.batch_id]
        return (
            row.status is S.QUEUED
            and row.cancel_requested_at is None
            and (row.run_after is None or row.run_after <= state.now)
            and (row.expires_at is None or row.expires_at > state.now)
            and (batch is None or batch.status is not BatchStatus.CANCELLING)
            and must_run_alone(row) == alone
        )

    # --- what follows from a transition ---

    def made(self, transition: Transition, reply: Reply[T], *also: str) -> None:
        """A transition was committed: it changed no other job than it says (and `also`)."""
        job_id = transition.job.id
        if reply.direct:
            changed = reply.before.changed(Job, reply.after)
            said = {job_id, *also, *(job.id for job in transition.queued)}
            others = sorted(map(self.name, changed - said))
            assert not others, f"{self.name(job_id)} moved, and {others} with it"
        if reply.heard:
            self.keep(transition)

    def keep(self, *transitions: Transition) -> None:
        """The caller has this to publish now."""
        queued = [job for each in transitions for job in each.queued]
        events = [event for each in transitions for event in each.events]
        if queued or events:
            self.parcels.append(Parcel(queued, events))


def check_counts(name: str, before: Row, after: Row, *, failed: int, crashed: int) -> None:
    """What an end of a run cost the job."""
    failures, crashes = after.failures - before.failures, after.crashes - before.crashes
    assert failures == failed, f"{name}: {failures} failures counted, not {failed}"
    assert crashes == crashed, f"{name}: {crashes} crashes counted, not {crashed}"
