"""What a client sends: prompts, jobs, batches, and how to generate."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

MAX_MESSAGES: Final = 256
MAX_PARTS: Final = 256
MAX_TEXT: Final = 1_000_000
MAX_INT64: Final = 2**63 - 1


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
    """Number of most likely alternatives to return for each token; 0: the token's own only."""
    response_format: dict[str, JsonValue] | None = None
    """``{"type": "json_schema" | "regex_schema" | "json_object", ...}``."""
    output_logits: Literal["all", "generation"] | None = None
    """For programs that have the model at hand (`visq.pipeline`). The API refuses it: logits are
    too large for a queue."""
    return_ppl: bool = False
    repetition_ngram_size: Annotated[int, Field(ge=0, le=1024)] = 0
    repetition_ngram_threshold: Annotated[int, Field(ge=0, le=1024)] = 0


class _Part(Wire):
    def model_post_init(self, context: Any, /) -> None:
        """``type`` tells parts apart, so it is sent even where only what was set is sent."""
        self.__pydantic_fields_set__.add("type")


class TextPart(_Part):
    type: Literal["text"] = "text"
    text: Annotated[str, Field(max_length=MAX_TEXT)]


class ImageUrl(Wire):
    """A reference to an image, in one of the three forms that the API takes."""

    url: Annotated[str, Field(min_length=1, max_length=30_000_000)]
    """``s3://bucket/key[?versionId=...]``, a ``data:`` URL, or an upload's id (``img_...``)."""
    detail: Literal["auto", "low", "high"] | None = None
    """Accepted for compatibility with OpenAI's message format; has no effect."""


class ImagePart(_Part):
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
