"""What a client sends: prompts, jobs, batches, and how to generate."""

from __future__ import annotations

import re
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
    """A reference to an image, in one of the forms that the API takes."""

    url: Annotated[str, Field(min_length=1, max_length=30_000_000)]
    """``s3://bucket/key[?versionId=...]``, an ``https://`` or ``data:`` URL, or an upload's id
    (``img_...``)."""
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
    """One item of a batch: a line of its file, or one of its ``items``."""

    custom_id: Annotated[str, Field(min_length=1, max_length=128)]
    """The caller's name of the item, unique in its batch."""
    session_id: SessionId | None = None
    """The stored session that this item continues."""
    session: NewSession | None = None
    """``{}`` opens a session with this item as its first turn."""
    after: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """`custom_id` of an item before it in the batch, which is in a session: this one is the next
    turn of that session."""
    metadata: Metadata = Field(default_factory=dict)
    on_image_change: Literal["fail", "accept"] = "fail"
    """What to do if an image of the session's history has changed since it was shown."""

    @model_validator(mode="after")
    def _one_session(self) -> BatchItem:
        given = [self.session_id, self.session, self.after]
        if len(given) - given.count(None) > 1:
            raise ValueError("give one of `session_id`, `session` and `after`, not several")
        if given.count(None) < len(given) and not self.do_preprocess:
            raise ValueError("a raw prompt (`do_preprocess: false`) cannot be part of a session")
        return self


class ExpiresAfter(Wire):
    """When an output file is deleted: OpenAI's form."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


ObjectUri = Annotated[str, Field(pattern="^s3://", min_length=8, max_length=1200)]

MAX_EXPIRES_SECONDS: Final = 30 * 86_400

_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_WINDOW_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class BatchRequest(Wire):
    """Body of ``POST /v1/batches``: its items inline, the name of a file that lies in the object
    store, or (OpenAI's form) the id of an uploaded file."""

    items: Annotated[list[BatchItem], Field(min_length=1, max_length=10_000)] | None = None
    input_uri: ObjectUri | None = None
    """``s3://bucket/in.jsonl`` (also ``.jsonl.gz``, ``.parquet``), one item a line; or, with
    ``prompt``, a prefix that ends with ``/``: every image under it is an item."""
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)] | None = None
    """What to ask of every image under a prefix."""
    output_uri: ObjectUri | None = None
    """Where the results are written in input order when all items have ended: a ``.jsonl``,
    ``.jsonl.gz`` or ``.parquet`` name, or a prefix that ends with ``/``. Errors and a summary are
    written beside it."""

    input_file_id: Annotated[str, Field(pattern="^fil_[0-9a-f]{32}$")] | None = None
    """An upload of ``POST /v1/files``, one item a line."""
    endpoint: Literal["/v1/chat/completions"] | None = None
    """With ``input_file_id``: the output files are in OpenAI's form, and not in visq's."""
    completion_window: Annotated[str, Field(max_length=16)] | None = None
    """With ``input_file_id``: after which time it expires: ``24h``, ``90m``, ``7d``."""
    output_expires_after: ExpiresAfter | None = None
    """With ``input_file_id``: when its output files are deleted."""

    lane: Lane = Lane.BATCH
    gen_config: GenerationConfig | None = None
    """Default for items that give none."""
    max_in_flight: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Most items that are at the workers at a time; by default as many as the workers hold."""
    expires_in: Annotated[float, Field(gt=0, le=MAX_EXPIRES_SECONDS)] | None = None
    """Seconds from now after which items that have not ended end as ``expired``."""
    on_item_error: Literal["continue", "stop"] = "continue"
    """``stop``: the first item that fails cancels those that have not ended."""
    dedupe: bool = False
    """Items that ask for the same (greedily, or with a seed) are done once; the others get its
    answer, and say so in ``result.duplicate_of``."""
    dry_run: bool = False
    """Only count what there is to do, and estimate how long it would take."""
    metadata: Metadata = Field(default_factory=dict)
    result_queue: QueueName | None = None

    @field_validator("completion_window")
    @classmethod
    def _window_is_a_time(cls, value: str | None) -> str | None:
        if value is not None and not 0 < window_seconds(value) <= MAX_EXPIRES_SECONDS:
            raise ValueError("a window is a time such as `24h`, of 30 days at most")
        return value

    @model_validator(mode="after")
    def _fits(self) -> BatchRequest:
        sources = [self.items, self.input_uri, self.input_file_id]
        if sources.count(None) != 2:
            raise ValueError("give one of `items`, `input_uri` and `input_file_id`")
        self._check_items()
        self._check_uris()
        openai = {"endpoint", "completion_window", "output_expires_after"}
        if self.input_file_id is None:
            if alien := sorted(openai & self.model_fields_set):
                raise ValueError(f"`{alien[0]}` goes with `input_file_id`")
        elif self.endpoint is not None and self.output_uri is not None:
            raise ValueError("the output in OpenAI's form is a file; leave out `output_uri`")
        elif self.expires_in is not None and self.completion_window is not None:
            raise ValueError("give `expires_in` or `completion_window`, not both")
        return self

    def _check_items(self) -> None:
        seen: set[str] = set()
        for item in self.items or ():
            if item.custom_id in seen:
                raise ValueError(f"`custom_id` {item.custom_id!r} is given twice")
            if item.after is not None and item.after not in seen:
                raise ValueError(
                    f"item {item.custom_id!r} comes after {item.after!r}, which is none before it"
                )
            seen.add(item.custom_id)

    def _check_uris(self) -> None:
        is_prefix = self.input_uri is not None and self.input_uri.endswith("/")
        if is_prefix and self.prompt is None:
            raise ValueError(
                "`input_uri` ends with `/`, so it is a prefix of images: say in `prompt` what to "
                "ask of them"
            )
        if self.prompt is not None and not is_prefix:
            raise ValueError("`prompt` goes with an `input_uri` that ends with `/`")

    @property
    def seconds(self) -> float | None:
        """After which it expires."""
        if self.expires_in is not None or self.completion_window is None:
            return self.expires_in
        return window_seconds(self.completion_window)


def window_seconds(window: str) -> float:
    """Seconds of a ``completion_window``; 0 if it is none."""
    found = _WINDOW.fullmatch(window)
    return 0.0 if found is None else float(int(found[1]) * _WINDOW_SECONDS[found[2]])
