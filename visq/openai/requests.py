"""The body of ``POST /v1/chat/completions``, and what it asks of visq.

Of OpenAI's fields, each is one of three: honoured, ignored (it changes no answer), or refused with
``unsupported_parameter`` unless its value means "not wanted". Names that neither OpenAI nor visq
knows are errors: a misspelt field is not a silent default.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Field, JsonValue

from visq.errors import InvalidRequest, ModelNotFound, UnsupportedParameter
from visq.openai.messages import ChatMessage, to_messages
from visq.types import (
    MAX_INT64,
    MAX_MESSAGES,
    GenerationConfig,
    JobRequest,
    Lane,
    Metadata,
    NewSession,
    Prompt,
    SessionId,
    StopWords,
    Wire,
)

TOP_LOGPROBS: Final = 20
"""Most alternatives of a token; OpenAI's number."""

Tokens = Annotated[int, Field(ge=1, le=131_072)]


class Ignored(Wire):
    """Fields that change no answer here: whatever they hold is accepted."""

    user: JsonValue = None
    safety_identifier: JsonValue = None
    store: JsonValue = None
    service_tier: JsonValue = None
    parallel_tool_calls: JsonValue = None
    prediction: JsonValue = None
    prompt_cache_key: JsonValue = None
    prompt_cache_options: JsonValue = None
    prompt_cache_retention: JsonValue = None


class Refused(Wire):
    """Fields that would change the answer, and that visq cannot honour. Accepted are ``null`` and
    the values of `MEANS_NOTHING`."""

    audio: JsonValue = None
    frequency_penalty: JsonValue = None
    function_call: JsonValue = None
    functions: JsonValue = None
    logit_bias: JsonValue = None
    modalities: JsonValue = None
    moderation: JsonValue = None
    presence_penalty: JsonValue = None
    reasoning_effort: JsonValue = None
    tool_choice: JsonValue = None
    tools: JsonValue = None
    verbosity: JsonValue = None
    web_search_options: JsonValue = None


MEANS_NOTHING: Final[dict[str, tuple[JsonValue, ...]]] = {
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
}
"""Values with which a field of `Refused` asks for nothing."""


class PlainText(Wire):
    type: Literal["text"]


class AnyJsonObject(Wire):
    type: Literal["json_object"]


class NamedSchema(Wire):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    """Not shown to the model: say in the prompt what is wanted."""
    schema_: Annotated[dict[str, JsonValue] | bool, Field(alias="schema")] = True
    """JSON Schema; without one, any JSON."""
    strict: bool | None = None
    """Has no effect: the schema is always followed."""


class JsonOfSchema(Wire):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class TextOfExpression(Wire):
    """visq's own."""

    type: Literal["regex_schema"]
    regex_schema: str
    """The regular expression that the whole answer matches."""


ResponseFormat: TypeAlias = Annotated[
    PlainText | AnyJsonObject | JsonOfSchema | TextOfExpression, Field(discriminator="type")
]


class StreamOptions(Wire):
    include_usage: bool | None = None
    """Send the usage in a last chunk of its own, which has no choices."""
    include_obfuscation: bool | None = None
    """Ignored."""


class ChatCompletionRequest(Ignored, Refused):
    """Body of ``POST /v1/chat/completions``, and of each line of a batch for it."""

    model: Annotated[str, Field(min_length=1, max_length=500)]
    """One of ``GET /v1/models``."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation; the last message is the user's."""
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    max_completion_tokens: Tokens | None = None
    """Most tokens to generate; ``null``: until the context is full."""
    max_tokens: Tokens | None = None
    """The older name of `max_completion_tokens`, which goes before it."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """``null``: 1. 0: the likeliest token each time."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)] | None = None
    """The same seed gives the same answer, whatever else runs beside it."""
    stop: Annotated[str, Field(min_length=1, max_length=200)] | StopWords | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    """Needs `logprobs`."""
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None
    """Kept with the job."""

    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """visq's own: sample among so many likeliest tokens; ``null`` or 0: among all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """visq's own."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    """visq's own."""
    min_tokens: Annotated[int, Field(ge=0, le=131_072)] | None = None
    """visq's own: fewest tokens before a stop token counts."""
    adapter_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """visq's own: the LoRA adapter to answer with."""
    session_id: SessionId | None = None
    """visq's own: the session that this turn continues; `messages` are then the new ones only."""
    session: NewSession | None = None
    """visq's own: ``{}`` opens a session, which the answer names in `session_id`."""
    lane: Lane | None = None
    """visq's own; ``null``: ``interactive``."""
    expires_in: Annotated[float, Field(gt=0, le=30 * 86_400)] | None = None
    """visq's own: seconds from now after which the job ends, wherever it is."""


def check_model(model: str, served: Collection[str] | None) -> None:
    """Without any worker, or while nobody can know (``None``), every model passes: its worker may
    come.

    :raises ModelNotFound: it is none of those that are `served`.
    """
    if served and model not in served:
        names = ", ".join(f"`{each}`" for each in sorted(served))
        raise ModelNotFound(f"no worker serves the model {model!r}; served: {names}", param="model")


def to_prompt(request: ChatCompletionRequest) -> Prompt:
    """What a model is asked.

    ==================================== =========================================================
    OpenAI's field                       becomes
    ==================================== =========================================================
    temperature (absent: 1)              ``do_sample`` with this temperature; 0: greedy
    top_p (absent: 1)                    ``top_p``
    max_completion_tokens, max_tokens    ``max_new_tokens``; absent: until the context is full
    stop                                 ``stop_words``, which are not part of the answer
    seed                                 ``random_seed``; of a negative one its lowest 63 bits
    logprobs, top_logprobs               ``logprobs``: number of alternatives
    n, response_format                   the same; a schema is followed, ``strict`` or not
    top_k (absent: 0, no limit)          ``top_k``
    min_p, repetition_penalty            the same
    min_tokens                           ``min_new_tokens``
    role ``developer``                   role ``system``
    ==================================== =========================================================

    :raises UnsupportedParameter: it asks for something that visq cannot honour.
    :raises InvalidRequest: fields contradict each other, or the last message is not the user's.
    """
    _check(request)
    return Prompt(
        messages=to_messages(request.messages),
        gen_config=_gen_config(request),
        adapter_name=request.adapter_name,
    )


def to_job(request: ChatCompletionRequest) -> JobRequest:
    """The job that answers it.

    :raises UnsupportedParameter: as `to_prompt`.
    :raises InvalidRequest: as `to_prompt`.
    """
    if request.session_id is not None and request.session is not None:
        raise InvalidRequest(
            "give `session_id` to continue or `session` to open one, not both", param="session"
        )
    prompt = to_prompt(request)
    return JobRequest(
        messages=prompt.messages,
        gen_config=prompt.gen_config,
        adapter_name=prompt.adapter_name,
        session_id=request.session_id,
        session=request.session,
        lane=request.lane or Lane.INTERACTIVE,
        expires_in=request.expires_in,
        metadata=request.metadata or {},
    )


def _check(request: ChatCompletionRequest) -> None:
    for field in Refused.model_fields:
        value = getattr(request, field)
        if value is not None and value not in MEANS_NOTHING.get(field, ()):
            raise UnsupportedParameter(f"`{field}` is not supported; leave it out", param=field)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")


def _gen_config(request: ChatCompletionRequest) -> GenerationConfig:
    temperature = 1.0 if request.temperature is None else request.temperature
    given = {
        "n": request.n,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "min_new_tokens": request.min_tokens,
        "random_seed": None if request.seed is None else request.seed & MAX_INT64,
        "stop_words": [request.stop] if isinstance(request.stop, str) else request.stop or None,
        "logprobs": request.top_logprobs or 0 if request.logprobs else None,
        "response_format": _response_format(request.response_format),
    }
    set_ = {name: value for name, value in given.items() if value is not None}
    return GenerationConfig(
        max_new_tokens=request.max_completion_tokens or request.max_tokens,
        do_sample=temperature > 0,
        temperature=temperature,
        top_k=request.top_k or 0,
        **set_,
    )


def _response_format(
    wanted: PlainText | AnyJsonObject | JsonOfSchema | TextOfExpression | None,
) -> dict[str, Any] | None:
    match wanted:
        case None | PlainText():
            return None
        case JsonOfSchema(json_schema=named):
            return {"type": "json_schema", "json_schema": {"schema": named.schema_}}
        case _:
            return wanted.model_dump()
