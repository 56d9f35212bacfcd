"""What visq shows: jobs and their results, sessions, batches, images, models, and pages of them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PlainSerializer, computed_field

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
    duplicate_of: str | None = None
    """In a batch with `dedupe`: the `custom_id` of the item that this answer was made for."""
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
    """Where a batch is in its life; the names are OpenAI's."""

    VALIDATING = "validating"
    """Nothing of its input was read yet."""
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    """All items have ended; its output is being written."""
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    """Every item has ended, whatever its end."""
    FAILED = "failed"
    """Its input cannot be read, or an item failed and `on_item_error` is `stop`."""
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in BATCH_ENDS


BATCH_ENDS: Final = frozenset(
    {BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)

UnixTime = Annotated[
    datetime, PlainSerializer(lambda at: int(at.timestamp()), int, when_used="json")
]
"""In JSON whole seconds since 1970, as in all of OpenAI's objects."""


class BatchError(BaseModel):
    """Why a batch failed as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """OpenAI's counters."""

    total: int
    completed: int
    failed: int


class TokenDetails(BaseModel):
    cached_tokens: int = 0


class ReasoningDetails(BaseModel):
    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of the items that succeeded, in OpenAI's form."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens_details: ReasoningDetails = ReasoningDetails()


class BatchView(BaseModel):
    """A batch as the API shows it: OpenAI's object, and visq's own fields beside."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str | None = None
    """`/v1/chat/completions` of a batch in OpenAI's form."""
    status: BatchStatus
    errors: BatchErrors | None = None
    """Why it failed as a whole."""
    input_file_id: str | None = None
    completion_window: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: UnixTime
    in_progress_at: UnixTime | None = None
    expires_at: UnixTime | None = None
    finalizing_at: UnixTime | None = None
    completed_at: UnixTime | None = None
    failed_at: UnixTime | None = None
    expired_at: UnixTime | None = None
    cancelling_at: UnixTime | None = None
    cancelled_at: UnixTime | None = None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str]

    lane: Lane
    counts: BatchCounts
    """By the ends of its items."""
    intake_done: bool = True
    """Whether its input was read to the end: until then `total` grows."""
    input_uri: str | None = None
    output_uri: str | None = None
    error_uri: str | None = None
    """Where the errors are written, if it has an `output_uri`."""
    summary_uri: str | None = None
    max_in_flight: int | None = None
    on_item_error: Literal["continue", "stop"] = "continue"
    dedupe: bool = False
    result_queue: str | None = None
    finished_at: UnixTime | None = None


class BatchEstimate(BaseModel):
    """What a batch would be (`dry_run`)."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["batch.estimate"] = "batch.estimate"
    items: int
    invalid_items: int
    """Items that would fail for what they say."""
    errors: list[BatchError]
    """The first of those."""
    images: int
    """References to images."""
    distinct_images: int | None
    """Of them; null if there are too many to tell apart."""
    prompt_tokens: int | None
    """Estimated from the latest jobs; null if there are none to compare with."""
    max_completion_tokens: int | None
    """If every answer is as long as it may be; null if one has no limit."""
    seconds: float | None
    """At the present speed of the workers, with nothing else to do; null if none is known."""


class ImageView(BaseModel):
    """An uploaded image."""

    id: str
    object: Literal["image"] = "image"
    uri: str
    sha256: str
    size: int
    """Bytes."""
    created_at: datetime


class FileView(BaseModel):
    """A file, in OpenAI's form."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: UnixTime
    expires_at: UnixTime | None = None
    """It is deleted then; `null`: only if it is asked for."""
    filename: str
    purpose: str
    """`batch`, `vision` or `user_data`, as it was uploaded; `batch_output`: of a batch."""
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """Some of a tenant's files, in OpenAI's form: give `last_id` as `after` for those behind."""

    object: Literal["list"] = "list"
    data: list[FileView]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class DeletedFile(BaseModel):
    """What is said of a file that was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class ModelView(BaseModel):
    """A model that at least one live worker serves."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix seconds: when the first of its workers was up; 0: not known."""
    owned_by: Literal["visq"] = "visq"
    engine: str
    device: str
    workers: int


class Page(BaseModel, Generic[T]):
    """One page of a list; ``next_cursor`` is ``None`` on the last one."""

    object: Literal["list"] = "list"
    data: list[T]
    next_cursor: str | None = None


class BatchPage(Page[BatchView]):
    """A page of batches, in visq's form and in OpenAI's."""

    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


Json = dict[str, Any]
