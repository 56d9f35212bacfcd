"""The shared vocabulary: what a client sends, what the queue carries, what a result says.

Pydantic models with ``extra="forbid"`` on everything that comes from outside, so that a misspelt
field is an error and not a silent default. No HTTP, SQL, Celery or torch here.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

T = TypeVar("T")

MAX_MESSAGES: Final = 256
MAX_PARTS: Final = 256
MAX_TEXT: Final = 1_000_000
MAX_INT64: Final = 2**63 - 1


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


class JobKind(StrEnum):
    CHAT = "chat"
    """A turn; may continue or open a session."""
    GENERATE = "generate"
    """One stateless answer."""


class Lane(StrEnum):
    """Which queue a job waits in; a free worker takes from the first lane that has work."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


class Wire(BaseModel):
    """Base of all request types: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=64)
]


class GenerationConfig(Wire):
    """How to generate: names and defaults of LMDeploy's ``GenerationConfig``."""

    n: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of answers."""
    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)] | None = 512
    """Most tokens to generate; ``None``: until the context is full."""
    min_new_tokens: Annotated[int, Field(ge=0, le=131_072)] | None = None
    """Fewest tokens before a stop token counts."""
    do_sample: bool = False
    """``False``: greedy; ``True``: sample with the fields below."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    ignore_eos: bool = False
    random_seed: Annotated[int, Field(ge=0, le=MAX_INT64)] | None = None
    """Seed of this request's sampler; ``None``: a random one."""
    stop_words: StopWords | None = None
    """Strings at which the answer ends."""
    bad_words: StopWords | None = None
    """Words that are never generated."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    bad_token_ids: Annotated[list[TokenId], Field(max_length=4096)] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: Annotated[int, Field(ge=0, le=64)] | None = None
    """Number of most likely alternatives to return for each token."""
    response_format: dict[str, JsonValue] | None = None
    """``{"type": "json_schema" | "regex_schema" | "json_object", ...}``."""
    output_logits: Literal["all", "generation"] | None = None
    return_ppl: bool = False
    repetition_ngram_size: Annotated[int, Field(ge=0, le=1024)] = 0
    repetition_ngram_threshold: Annotated[int, Field(ge=0, le=1024)] = 0


class TextPart(Wire):
    type: Literal["text"] = "text"
    text: Annotated[str, Field(max_length=MAX_TEXT)]


class ImageUrl(Wire):
    """A reference to an image, in one of the three forms that the API takes."""

    url: Annotated[str, Field(min_length=1, max_length=30_000_000)]
    """``s3://bucket/key[?versionId=...]``, a ``data:`` URL, or an upload's id (``img_...``)."""
    detail: Literal["auto", "low", "high"] | None = None
    """Accepted for compatibility with OpenAI's message format; has no effect."""


class ImagePart(Wire):
    type: Literal["image_url"] = "image_url"
    image_url: ImageUrl
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the bytes that must be shown; another content fails with ``image_changed``."""

    @field_validator("image_url", mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"url": value} if isinstance(value, str) else value


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Wire):
    """One message in OpenAI's form; ``content`` is a string or a list of parts."""

    role: Literal["system", "user", "assistant"]
    content: (
        Annotated[str, Field(max_length=MAX_TEXT)]
        | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
    )

    def parts(self) -> list[TextPart | ImagePart]:
        """The content as a list of parts, whatever its form."""
        if isinstance(self.content, str):
            return [TextPart(text=self.content)]
        return list(self.content)


Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
"""Up to 16 pairs of strings (64 and 512 characters); returned as given."""


class NewSession(Wire):
    """Opens a session with this job as its first turn."""

    metadata: Metadata = Field(default_factory=dict)


QueueName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
SessionId = Annotated[str, Field(pattern=r"^ses_[0-9a-f]{32}$")]


class Prompt(Wire):
    """What the model is asked: ``messages``, or the short form ``prompt`` and ``images``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    """OpenAI message dicts; the last one is the user's."""
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)] | None = None
    images: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=30_000_000)]],
        Field(max_length=MAX_PARTS - 1),  # the text is a part as well
    ] = []
    """Image references for ``prompt``, placed before its text in this order."""
    gen_config: GenerationConfig = GenerationConfig()
    do_preprocess: bool = True
    """``False``: ``prompt`` is raw text for the model, no chat template is applied."""
    adapter_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Prompt:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError(
                "give either `messages`, or `prompt` (with `images`), not both or none"
            )
        if self.messages is not None:
            if self.images:
                raise ValueError("`images` goes with `prompt`; put image parts into `messages`")
            if self.messages[-1].role != "user":
                raise ValueError("the last message must have the role `user`")
            if not self.do_preprocess:
                raise ValueError("`do_preprocess: false` needs the short form `prompt`")
        return self

    def as_messages(self) -> list[Message]:
        """The prompt as messages, whatever form it was given in."""
        if self.messages is not None:
            return self.messages
        assert self.prompt is not None
        parts: list[TextPart | ImagePart] = [
            ImagePart(image_url=ImageUrl(url=url)) for url in self.images
        ]
        return [Message(role="user", content=[*parts, TextPart(text=self.prompt)])]


class JobRequest(Prompt):
    """Body of ``POST /v1/jobs``."""

    kind: JobKind = JobKind.CHAT
    session_id: SessionId | None = None
    """The session that this turn continues."""
    session: NewSession | None = None
    """``{}`` opens a session with this turn as its first."""
    lane: Lane = Lane.INTERACTIVE
    expires_in: Annotated[float, Field(gt=0, le=30 * 86_400)] | None = None
    """Seconds from now after which the job ends as ``expired`` wherever it is."""
    metadata: Metadata = Field(default_factory=dict)
    result_queue: QueueName | None = None
    """Also publish the result to the queue ``visq.results.<tenant>.<result_queue>``."""
    on_image_change: Literal["fail", "accept"] = "fail"
    """What to do if an image of the session's history has changed since it was shown."""

    @model_validator(mode="after")
    def _session_fits(self) -> JobRequest:
        if self.session_id is not None and self.session is not None:
            raise ValueError("give `session_id` to continue or `session` to open one, not both")
        has_session = self.session_id is not None or self.session is not None
        if has_session and self.kind is JobKind.GENERATE:
            raise ValueError("a job of kind `generate` has no session; use kind `chat`")
        if has_session and not self.do_preprocess:
            raise ValueError("a raw prompt (`do_preprocess: false`) cannot be part of a session")
        return self


class BatchItem(Prompt):
    """One item of a batch."""

    custom_id: Annotated[str, Field(min_length=1, max_length=128)]
    """The caller's name of the item, unique in its batch."""
    metadata: Metadata = Field(default_factory=dict)


class BatchRequest(Wire):
    """Body of ``POST /v1/batches``."""

    items: Annotated[list[BatchItem], Field(min_length=1, max_length=10_000)]
    lane: Lane = Lane.BATCH
    gen_config: GenerationConfig | None = None
    """Default for items that give none."""
    expires_in: Annotated[float, Field(gt=0, le=30 * 86_400)] | None = None
    metadata: Metadata = Field(default_factory=dict)
    result_queue: QueueName | None = None

    @model_validator(mode="after")
    def _unique_custom_ids(self) -> BatchRequest:
        seen: set[str] = set()
        for item in self.items:
            if item.custom_id in seen:
                raise ValueError(f"`custom_id` {item.custom_id!r} is given twice")
            seen.add(item.custom_id)
        return self


class ErrorBody(BaseModel):
    """The one shape of an error, in responses and in jobs."""

    code: str
    message: str
    param: str | None = None


class Usage(BaseModel):
    """Tokens and images that a job used."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0


class JobResult(BaseModel):
    """What the model answered."""

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    model: str


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
