"""The messages of a chat completion, in all forms in which OpenAI's clients send them."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, JsonValue, field_validator

from visq.errors import InvalidRequest, UnsupportedParameter
from visq.types import MAX_PARTS, MAX_TEXT, ImagePart, ImageUrl, Message, TextPart, Wire

Text = Annotated[str, Field(max_length=MAX_TEXT)]


class ChatText(Wire):
    """A part of text."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: JsonValue = None
    """Ignored: every prefix is cached."""


class ChatImageUrl(Wire):
    url: Annotated[str, Field(min_length=1, max_length=30_000_000)]
    """``https://...``, ``s3://bucket/key``, a ``data:`` URL, or an upload's id (``img_...``)."""
    detail: str | None = None
    """Ignored: the model's processor decides how an image is shown."""


class ChatImage(Wire):
    """A part that is an image."""

    type: Literal["image_url"]
    image_url: ChatImageUrl
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """visq's own: the SHA-256 of the bytes that must be shown."""
    prompt_cache_breakpoint: JsonValue = None
    """Ignored: every prefix is cached."""

    @field_validator("image_url", mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"url": value} if isinstance(value, str) else value


ChatPart: TypeAlias = Annotated[ChatText | ChatImage, Field(discriminator="type")]


class ChatMessage(Wire):
    """One message; the fields that only an answer of the model has may come back with it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    """``developer`` is understood as ``system``; tools are not supported."""
    content: Text | Annotated[list[ChatPart], Field(min_length=1, max_length=MAX_PARTS)] | None = (
        None
    )
    name: str | None = None
    """Ignored: the chat templates of open models know no names."""
    refusal: str | None = None
    """Ignored: the model of this API never sets it."""
    annotations: JsonValue = None
    """Ignored: the model of this API never sets it."""
    audio: JsonValue = None
    """Not supported; ``null`` is accepted."""
    function_call: JsonValue = None
    """Not supported; ``null`` is accepted."""
    tool_calls: JsonValue = None
    """Not supported; ``null`` and an empty list are accepted."""
    tool_call_id: str | None = None
    """Not supported; ``null`` is accepted."""


_OF_TOOLS: Final = ("audio", "function_call", "tool_calls", "tool_call_id")


def to_messages(said: list[ChatMessage]) -> list[Message]:
    """The messages as visq's.

    :raises UnsupportedParameter: a message is of a tool, or of its use.
    :raises InvalidRequest: a message says nothing, or the last one is not the user's.
    """
    messages = [_message(each, f"messages.{index}") for index, each in enumerate(said)]
    if messages[-1].role != "user":
        raise InvalidRequest("the last message must have the role `user`", param="messages")
    return messages


def _message(said: ChatMessage, place: str) -> Message:
    if said.role in ("tool", "function"):
        raise UnsupportedParameter(
            f"{place}.role: tools are not supported, so no message can be of one",
            param=f"{place}.role",
        )
    for field in _OF_TOOLS:
        if getattr(said, field):
            raise UnsupportedParameter(
                f"{place}.{field}: audio and tools are not supported; send text and images",
                param=f"{place}.{field}",
            )
    if said.content is None:
        raise InvalidRequest(
            f"{place}.content: field required; only a call of a tool has none",
            param=f"{place}.content",
        )
    content = said.content if isinstance(said.content, str) else [*map(_part, said.content)]
    return Message(role="system" if said.role == "developer" else said.role, content=content)


def _part(said: ChatText | ChatImage) -> TextPart | ImagePart:
    if isinstance(said, ChatText):
        return TextPart(text=said.text)
    return ImagePart(image_url=ImageUrl(url=said.image_url.url), sha256=said.sha256)
