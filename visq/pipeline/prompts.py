"""The forms that a prompt may have, and the messages that they mean.

::

    "text"                                        one prompt
    ("text", image), ("text", [images])           one prompt; (image, "text") as well
    [{"role": ..., "content": ...}, ...]          one prompt: OpenAI message dicts
    [any of the above, ...]                       many prompts

Which form it is, is looked at when the call begins (`as_list`, a `ValueError`); what is in it, when
its turn comes (`conversation`), so that a fault is that prompt's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from visq.client.images import PilImage
from visq.errors import InvalidRequest, UnsupportedParameter
from visq.types import ImagePart, ImageUrl, Message, TextPart
from visq.vl.constants import IMAGE_TOKEN

UNNAMED: Final = ImagePart(image_url=ImageUrl(url="-"))
"""Stands for an image in a message; `Conversation.images` says which."""

_IMAGE_TYPES: Final = ("image_url", "image", "image_data")
_OTHER_MEDIA: Final = ("video", "video_url", "audio", "audio_url", "time_series", "time_series_url")
_IMAGE_PREFIXES: Final = ("http://", "https://", "data:image", "s3://", "file://")


class PromptError(InvalidRequest, ValueError):
    """A call whose arguments do not fit; also a ``ValueError``, which LMDeploy raises."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt, taken apart."""

    messages: list[Message]
    images: list[Any]
    """One for each image part of `messages`, in their order: a reference or a PIL image."""


def as_list(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts of a call, and whether it was a single one.

    :raises PromptError: it has none of the forms.
    """
    single = not isinstance(prompts, list) or _is_messages(prompts)
    listed = [prompts] if single else prompts
    for prompt in listed:
        if not (isinstance(prompt, str) or _is_pair(prompt) or _is_messages(prompt)):
            raise PromptError(
                f"unsupported prompt ({_shape(prompt)}): give a string, a pair of a text and an "
                "image or a list of images, OpenAI message dicts, or a list of these",
                param="prompts",
            )
    return listed, single


def conversation(prompt: Any) -> Conversation:
    """What one prompt means.

    :raises InvalidRequest: a message or a part of it has a form that nobody knows.
    :raises UnsupportedParameter: it has one that visq does not take (video, audio, ...).
    """
    found: list[tuple[Message, list[Any]]]
    if isinstance(prompt, str):
        found = [(_message("user", prompt), [])]
    elif isinstance(prompt, tuple):
        found = [_of_pair(prompt)]
    else:
        found = [_of_dict(message) for message in prompt]
    return Conversation(
        [message for message, _ in found], [image for _, images in found for image in images]
    )


def joined(turns: Sequence[Conversation]) -> Conversation:
    """One conversation after the other."""
    return Conversation(
        [message for turn in turns for message in turn.messages],
        [image for turn in turns for image in turn.images],
    )


def answer(text: str) -> Conversation:
    """An answer of the model, as part of a history."""
    return Conversation([_message("assistant", text)], [])


def with_system(said: Conversation, text: str | None) -> Conversation:
    """`said` with a system message before it, unless it has one."""
    if not text or (said.messages and said.messages[0].role == "system"):
        return said
    return Conversation([_message("system", text), *said.messages], said.images)


def with_urls(said: Conversation, urls: Sequence[str]) -> list[Message]:
    """The messages, with a name for each image."""
    remaining = iter(urls)
    return [
        message
        if isinstance(message.content, str)
        else Message(
            role=message.role,
            content=[
                ImagePart(image_url=ImageUrl(url=next(remaining)))
                if isinstance(part, ImagePart)
                else part
                for part in message.content
            ],
        )
        for message in said.messages
    ]


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) for m in prompt)


def _is_pair(prompt: Any) -> bool:
    return isinstance(prompt, tuple) and len(prompt) == 2 and _text_first(*prompt) is not None


def _text_first(one: Any, two: Any) -> bool | None:
    """Whether a pair is (text, image), or (image, text); ``None``: neither."""
    if isinstance(two, str) and _are_images(one):  # two texts that look like URLs: image first
        return False
    if isinstance(one, str) and _are_images(two):
        return True
    return None


def _are_images(value: Any) -> bool:
    return all(map(_is_image, value)) if isinstance(value, list) else _is_image(value)


def _is_image(value: Any) -> bool:
    if isinstance(value, str):  # else it may be the text: a path is given as a pathlib.Path
        return value.startswith(_IMAGE_PREFIXES)
    return isinstance(value, os.PathLike | PilImage)


def _of_pair(pair: tuple[Any, Any]) -> tuple[Message, list[Any]]:
    text_first = _text_first(*pair)
    text, images = pair if text_first else reversed(pair)
    images = images if isinstance(images, list) else [images]
    pieces = [text, *map(_Image, images)] if text_first else [*map(_Image, images), text]
    return _placed("user", pieces)


def _of_dict(message: Mapping[str, Any]) -> tuple[Message, list[Any]]:
    for name, value in message.items():
        if name not in ("role", "content") and value is not None:
            raise UnsupportedParameter(f"visq does not support `{name}` in a message", param=name)
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        return _message(role, "" if content is None else content), []
    return _placed(role, [_piece(item) for item in content])


@dataclass(frozen=True, slots=True)
class _Image:
    source: Any


def _piece(item: Any) -> str | _Image:
    """A part of a message's content: a text or an image."""
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text":
        text = item.get("text", "")
        if not isinstance(text, str):
            raise InvalidRequest(f"the `text` of a text part is a {type(text).__name__}")
        return text
    if kind in _OTHER_MEDIA:
        raise UnsupportedParameter(f"visq does not support parts of type `{kind}`", param="content")
    if kind not in _IMAGE_TYPES:
        raise InvalidRequest(
            f"unknown type of a part of a message: {kind!r}; give `text` or `image_url`",
            param="content",
        )
    value = item.get(kind)
    if isinstance(value, Mapping):
        more = dict(value)
        url, data = more.pop("url", None), more.pop("data", None)
        source = data if url is None else url
    else:
        more = {name: v for name, v in item.items() if name not in ("type", kind)}
        source = value
    for name in more.keys() - {"detail"}:
        raise UnsupportedParameter(f"visq does not support `{name}` of an image", param=name)
    if source is None:
        raise InvalidRequest(f"a part of type `{kind}` has no image: give `url` or `data`")
    return _Image(source)


def _placed(role: Any, pieces: Sequence[str | _Image]) -> tuple[Message, list[Any]]:
    """The message, with the images where `IMAGE_TOKEN` wants them."""
    images = [piece for piece in pieces if isinstance(piece, _Image)]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    wanted = sum(text.count(IMAGE_TOKEN) for text in texts)
    if wanted and images:
        if wanted != len(images):
            raise InvalidRequest(
                f"a message has {len(images)} images and {wanted} times {IMAGE_TOKEN}: give one "
                "for each image, or none",
                param="content",
            )
        pieces = list(_split(texts, iter(images)))
    parts = [TextPart(text=p) if isinstance(p, str) else UNNAMED for p in pieces]
    sources = [piece.source for piece in pieces if isinstance(piece, _Image)]
    return _message(role, parts), sources


def _split(texts: Sequence[str], images: Iterator[_Image]) -> Iterator[str | _Image]:
    for text in texts:
        first, *others = text.split(IMAGE_TOKEN)
        if first:
            yield first
        for rest in others:
            yield next(images)
            if rest:
                yield rest


def _message(role: Any, content: Any) -> Message:
    try:
        return Message(role=role, content=content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise InvalidRequest(f"a message's {where}: {first['msg']}", param="messages") from None


def _shape(prompt: Any) -> str:
    """A prompt in a word or two; it may be large or private."""
    if isinstance(prompt, list | tuple):
        inner = ", ".join(type(each).__name__ for each in prompt[:3])
        return f"{type(prompt).__name__} of {inner or 'nothing'}"
    return type(prompt).__name__
