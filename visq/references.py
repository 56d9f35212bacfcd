"""Image references as clients give them, and as workers see them.

A client names an image by an ``s3://`` name, a URL, a ``data:`` URL, or the id of an upload. What
a worker sees is ``s3://`` names and URLs only, and the SHA-256 wherever the bytes are known:
``data:`` URLs become uploads, ids of uploads become their ``s3://`` names. The parts here do no
I/O; who takes requests in (`api.intake`, `worker.queue.batch_reading`) does.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from visq.errors import (
    ImageChanged,
    ImageTooLarge,
    ImageUndecodable,
    InvalidRequest,
    UnsupportedParameter,
    VisqError,
)
from visq.objects import ObjectRef
from visq.objects.images import image_ref
from visq.objects.web_ref import is_web
from visq.settings import Settings
from visq.types import GenerationConfig, ImagePart, ImageUrl, Message, Prompt, TextPart

PromptT = TypeVar("PromptT", bound=Prompt)

_IMAGE_ID = re.compile(r"img_[0-9a-f]{32}")

_DATA_URL = re.compile(r"data:image/[\w.+-]{1,64};base64,", re.ASCII)

_MAGIC: Final = {
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "image/bmp": re.compile(rb"BM"),
}


@dataclass(frozen=True)
class Stored:
    """Where an image lies; its SHA-256 if the bytes are known."""

    uri: str
    sha256: str | None = None


def check_answerable(config: GenerationConfig | None, place: str = "") -> None:
    """:raises UnsupportedParameter: it asks for what cannot come back through a queue."""
    if config is not None and config.output_logits is not None:
        raise UnsupportedParameter(
            "logits are too large for a queue; ask for `logprobs`, or run the model in your own "
            "program (`visq.pipeline`)",
            param=f"{place}gen_config.output_logits",
        )


def references(prompt: Prompt) -> Iterator[tuple[str, str]]:
    """Path and text of every image reference."""
    for index, url in enumerate(prompt.images):
        yield f"images.{index}", url
    for i, message in enumerate(prompt.messages or []):
        if not isinstance(message.content, str):
            for j, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    yield f"messages.{i}.content.{j}.image_url.url", part.image_url.url


def check_names(places: Mapping[str, str], tenant: str, settings: Settings) -> dict[str, Stored]:
    """The ``s3://`` names and URLs among references, which are given by their place in the request;
    anything that has no form at all is refused here.

    :raises InvalidRequest: a reference has none of the forms that are taken.
    :raises ImageForbidden: the tenant may not read it.
    """
    stored = {}
    for url, place in places.items():
        if is_data(url) or is_id(url):
            continue
        if not url.startswith("s3://") and not is_web(url):
            raise InvalidRequest(
                f"{place}: give an image as `s3://bucket/key`, an `https://` or `data:` URL, or "
                "the id of an upload (`img_...`)",
                param=place,
            )
        try:
            ref = image_ref(url, tenant, settings)
        except VisqError as error:
            raise at_place(place, error) from None
        stored[url] = Stored(ref.uri)
    return stored


def image_type(data: bytes) -> str:
    """:raises ImageUndecodable: the bytes do not begin like an image."""
    for content_type, magic in _MAGIC.items():
        if magic.match(data):
            return content_type
    kinds = ", ".join(content_type.removeprefix("image/").upper() for content_type in _MAGIC)
    raise ImageUndecodable(f"this is not an image in a format that is read ({kinds})")


def upload_ref(tenant: str, sha256: str, settings: Settings) -> ObjectRef:
    """Where an upload lies: the same bytes of a tenant are the same object."""
    return ObjectRef(settings.upload_bucket, f"{tenant}/{sha256}")


def file_ref(tenant: str, file_id: str, settings: Settings) -> ObjectRef:
    """Where the bytes of a file of ``/v1/files`` lie."""
    return ObjectRef(settings.upload_bucket, f"{tenant}/files/{file_id}")


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a ``data:image/...;base64,`` URL.

    :raises InvalidRequest: it is not one.
    :raises ImageTooLarge: it has more than `max_bytes`.
    :raises ImageUndecodable: its base64 is broken.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise InvalidRequest("a `data:` URL must begin like `data:image/png;base64,`")
    text = url[head.end() :]
    if len(text) > (max_bytes + 2) // 3 * 4:
        raise ImageTooLarge(f"the image in the `data:` URL has more than {max_bytes} bytes")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise ImageUndecodable(f"the base64 of the `data:` URL is broken: {error}") from None


def rewritten(prompt: PromptT, stored: Mapping[str, Stored], place: str = "") -> PromptT:
    """The prompt as a worker sees it.

    :param place: of the prompt in the request.
    :raises ImageChanged: it gives another SHA-256 than the upload has.
    """
    if prompt.messages is not None:
        messages = [
            _rewritten_message(message, stored, f"{place}messages.{index}.")
            for index, message in enumerate(prompt.messages)
        ]
        return prompt.model_copy(update={"messages": messages})
    if not prompt.images:
        return prompt
    if not prompt.do_preprocess:
        # A raw prompt keeps its form; uploads are named by their content anyway.
        return prompt.model_copy(update={"images": [stored[url].uri for url in prompt.images]})
    parts = [_image_part(stored[url]) for url in prompt.images]
    text = TextPart(text=prompt.prompt or "")
    message = Message(role="user", content=[*parts, text])
    return prompt.model_copy(update={"messages": [message], "prompt": None, "images": []})


def _rewritten_message(message: Message, stored: Mapping[str, Stored], place: str) -> Message:
    if isinstance(message.content, str):
        return message
    content: list[TextPart | ImagePart] = []
    for index, part in enumerate(message.content):
        if isinstance(part, ImagePart):
            found = stored[part.image_url.url]
            if part.sha256 and found.sha256 and part.sha256 != found.sha256:
                raise ImageChanged(
                    "this image has not the SHA-256 that the request gives",
                    param=f"{place}content.{index}.sha256",
                )
            content.append(_image_part(found, part))
        else:
            content.append(part)
    return message.model_copy(update={"content": content})


def _image_part(stored: Stored, given: ImagePart | None = None) -> ImagePart:
    detail = given.image_url.detail if given else None
    sha256 = stored.sha256 or (given.sha256 if given else None)
    return ImagePart(image_url=ImageUrl(url=stored.uri, detail=detail), sha256=sha256)


def is_data(url: str) -> bool:
    return url.startswith("data:")


def is_id(url: str) -> bool:
    return _IMAGE_ID.fullmatch(url) is not None


def at_place(place: str, error: VisqError) -> VisqError:
    """The same error, with the place in the body that it is about."""
    return type(error)(f"{place}: {error.message}", param=place)
