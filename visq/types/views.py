"""What visq shows: jobs and their results, sessions, batches, images, models, and pages of them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, computed_field

from visq.errors import type_of
from visq.types.requests import ImagePart, JobKind, Lane, TextPart

T = TypeVar("T")


class JobStatus(StrEnum):
    """Where a job is in its life (`models/jobs.py` holds the transitions)."""

    WAITING = "waiting"
    """An earlier turn of its session has not ended."""
    QUEUED = "queued"
    """Ready for a worker."""
    RUNNING = "running"
    """Claimed by a worker, under a lease."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """`expires_at` passed before it ended."""

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL: Final = frozenset(
    {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED}
)


class ErrorBody(BaseModel):
    """The one shape of an error, in responses and in jobs."""

    code: str
    message: str
    param: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def type(self) -> str:
        """As OpenAI's API says it: `invalid_request_error` or `server_error`."""
        return type_of(self.code)


class Usage(BaseModel):
    """Tokens and images that a job used."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Generated tokens, of all choices together."""
    images: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that came from the prefix cache; they count in `prompt_tokens` too."""


class Choice(BaseModel):
    """One answer."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    text: str
    finish_reason: Literal["stop", "length"]
    """`stop`: an end token or a stop word; `length`: `max_new_tokens` or the full context."""
    token_ids: list[int] | None = None
    """If `logprobs` were asked for: the generated tokens."""
    logprobs: list[dict[int, float]] | None = None
    """If asked for: of each of `token_ids`, `{"<token id>": logprob}` (natural logarithm) of the
    token itself and of the likeliest ones, in no particular order."""
    tokens: dict[int, str] | None = None
    """If `logprobs` were asked for: the text of every token in them; of a token that is a part of
    a character, its bytes, written `bytes:\\xe2\\x80`."""


class JobResult(Choice):
    """What the model answered; with `n` > 1, its first choice."""

    usage: Usage
    model: str
    choices: list[Choice] | None = None
    """If `n` > 1: all choices, the first one included."""
    ppl: float | None = None
    """If `return_ppl`: mean negative log likelihood (natural) of the prompt's tokens, each given
    those before it."""


class WaitingFor(BaseModel):
    """Why a job is not running yet."""

    reason: Literal["turn", "lane", "retry", "worker"]
    """An earlier turn; its place in the lane; a retry at a time; no worker is running."""
    job_id: str | None = None
    position: int | None = None
    """Jobs of the same lane before this one."""
    at: datetime | None = None


class JobView(BaseModel):
    """A job as the API shows it."""

    id: str
    object: Literal["job"] = "job"
    kind: JobKind
    status: JobStatus
    lane: Lane
    session_id: str | None = None
    turn: int | None = None
    batch_id: str | None = None
    custom_id: str | None = None
    position: int | None = None
    """Place in its batch, from 0."""
    attempt: int
    max_attempts: int
    metadata: dict[str, str]
    result_queue: str | None = None
    result: JobResult | None = None
    error: ErrorBody | None = None
    waiting_for: WaitingFor | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = None


class JobEventView(BaseModel):
    """One transition of a job's life."""

    at: datetime
    from_status: JobStatus | None
    to_status: JobStatus
    attempt: int
    worker: str | None
    reason: str | None


class SessionView(BaseModel):
    id: str
    object: Literal["session"] = "session"
    turns: int
    """Turns submitted so far, whatever became of them."""
    metadata: dict[str, str]
    forked_from: str | None = None
    created_at: datetime
    updated_at: datetime


class StoredMessage(BaseModel):
    """A message of a session's history."""

    turn: int
    role: Literal["system", "user", "assistant"]
    content: list[TextPart | ImagePart]
    job_id: str | None
    created_at: datetime


class BatchCounts(BaseModel):
    total: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int

    @property
    def finished(self) -> int:
        return self.succeeded + self.failed + self.cancelled + self.expired


class BatchStatus(StrEnum):
    IN_PROGRESS = "in_progress"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


class BatchView(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    status: BatchStatus
    lane: Lane
    counts: BatchCounts
    metadata: dict[str, str]
    result_queue: str | None = None
    created_at: datetime
    finished_at: datetime | None = None


class ImageView(BaseModel):
    """An uploaded image."""

    id: str
    object: Literal["image"] = "image"
    uri: str
    sha256: str
    size: int
    """Bytes."""
    created_at: datetime


class ModelView(BaseModel):
    """A model that at least one live worker serves."""

    id: str
    object: Literal["model"] = "model"
    engine: str
    device: str
    workers: int


class Page(BaseModel, Generic[T]):
    """One page of a list; ``next_cursor`` is ``None`` on the last one."""

    object: Literal["list"] = "list"
    data: list[T]
    next_cursor: str | None = None


Json = dict[str, Any]
