"""The words of a job's life: what a run holds, how it ends, and what a transition leaves to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.outbox import OutboxEntry
from models.tables import Job
from visq import types
from visq.errors import VisqError
from visq.types import JobResult, Lane, Prompt


@dataclass(frozen=True)
class Claim:
    """The right to write for one attempt of one job."""

    job_id: str
    attempt: int
    session_id: str | None


@dataclass(frozen=True)
class ShownPicture:
    """What a worker found when it showed a picture: with it, the next turn need not read the
    picture again. Never from a client."""

    height: int
    width: int
    """Of the decoded picture, in pixels."""
    etag: str
    """Of the object, when its bytes were fetched."""


@dataclass(frozen=True)
class Remembered:
    """A message of a session's history."""

    message: types.Message
    token_ids: list[int] | None = None
    """Of an answer, if they are known: the exact tokens that were generated."""
    tokenizer: str | None = None
    """Whose numbers `token_ids` are: `EngineInfo.tokenizer`."""
    pictures: list[ShownPicture | None] = field(default_factory=list)
    """One for each image part; ``None`` if nothing is known of it."""


@dataclass(frozen=True)
class Work:
    """A claimed job with all that a run needs."""

    claim: Claim
    tenant_id: str
    tenant: str
    lane: Lane
    batch_id: str | None
    dedupe_key: str | None
    """If an answer to another item of the batch with this key will do."""
    prompt: Prompt
    accept_changed_images: bool
    history: list[Remembered]
    expires_in: float | None
    """Seconds until the job's deadline."""


@dataclass(frozen=True)
class Succeeded:
    result: JobResult
    messages: list[types.Message]
    """The turn for the session's history: its request, with image hashes, and the answer."""
    answer_ids: list[int] | None = None
    """The exact tokens of that answer, the last of `messages`; ``None``: the history goes on from
    its text."""
    tokenizer: str | None = None
    """Whose numbers `answer_ids` are."""
    pictures: Mapping[str, ShownPicture] = field(default_factory=dict)
    """By URL: what is known of the pictures in `messages`."""


@dataclass(frozen=True)
class Failed:
    """A retryable error leads back to ``queued`` while attempts are left; `EngineCrashed` is no
    failure of a job that was not alone in the engine."""

    error: VisqError
    backoff_seconds: float = 1.0


@dataclass(frozen=True)
class Cancelled:
    pass


@dataclass(frozen=True)
class Expired:
    pass


@dataclass(frozen=True)
class HandedBack:
    """The worker stops before the job ended; the attempt does not count."""

    reason: str


Outcome = Succeeded | Failed | Cancelled | Expired | HandedBack


@dataclass(frozen=True)
class QueuedJob:
    """A job to publish to the broker."""

    id: str
    lane: Lane
    alone: bool = False
    """Whether it must run without others beside it."""


@dataclass(frozen=True)
class Transition:
    """A committed change, and what must be published because of it."""

    job: Job
    queued: list[QueuedJob] = field(default_factory=list)
    events: list[OutboxEntry] = field(default_factory=list)


@dataclass(frozen=True)
class Renewed:
    """A lease that was extended."""

    claim: Claim
    cancel_requested: bool
