"""What a request may ask of a queue; and its image references, checked and made durable before the
job is accepted.

``s3://`` names and ``https://`` URLs are checked and not fetched; ``data:`` URLs become uploads, so
that a session's history can show them again; ids of uploads become their ``s3://`` names. What a
worker sees is ``s3://`` names and URLs only, and the SHA-256 wherever the bytes are known.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from sqlalchemy.orm import Session

from api import uploads
from api.auth import Caller
from api.services import Services
from models import reading
from models.submit import body_fingerprint
from models.tables import Image
from visq.errors import (
    ImageChanged,
    ImageNotFound,
    InvalidRequest,
    UnsupportedParameter,
    VisqError,
)
from visq.objects.images import image_ref
from visq.objects.web_ref import is_web
from visq.types import (
    BatchRequest,
    GenerationConfig,
    ImagePart,
    ImageUrl,
    JobRequest,
    Message,
    Prompt,
    TextPart,
)

PromptT = TypeVar("PromptT", bound=Prompt)

UPLOADS_AT_A_TIME: Final = 4
"""Of the ``data:`` URLs of one request."""
MANY: Final = 100

_IMAGE_ID = re.compile(r"img_[0-9a-f]{32}")


@dataclass(frozen=True)
class Stored:
    """Where an image lies; its SHA-256 if the bytes are known."""

    uri: str
    sha256: str | None = None


async def resolve_job(here: Services, caller: Caller, request: JobRequest) -> JobRequest:
    """The request with durable image references.

    :raises UnsupportedParameter: it asks for what cannot come back through a queue.
    :raises InvalidRequest: a reference has none of the forms that are taken.
    :raises ImageError: an image is unknown, not the tenant's to read, or not an image.
    :raises Unavailable: the object store did not take an image.
    """
    _check_answerable(request.gen_config)
    [resolved] = await _resolve(here, caller, {"": request})
    return resolved


async def resolve_batch(here: Services, caller: Caller, request: BatchRequest) -> BatchRequest:
    """As `resolve_job`, for every item."""
    _check_answerable(request.gen_config)
    prompts = {f"items.{index}.": item for index, item in enumerate(request.items)}
    for place, item in prompts.items():
        _check_answerable(item.gen_config, place)
    items = await _resolve(here, caller, prompts)
    return request.model_copy(update={"items": items})


async def fingerprint(request: JobRequest | BatchRequest, idempotency_key: str | None) -> str:
    """What a repeat of the key must equal: the body as the client sent it."""
    if idempotency_key is None:
        return ""
    return await asyncio.to_thread(body_fingerprint, request)


def _check_answerable(config: GenerationConfig | None, place: str = "") -> None:
    if config is not None and config.output_logits is not None:
        raise UnsupportedParameter(
            "logits are too large for a queue; ask for `logprobs`, or run the model in your own "
            "program (`visq.pipeline`)",
            param=f"{place}gen_config.output_logits",
        )


async def _resolve(here: Services, caller: Caller, prompts: Mapping[str, PromptT]) -> list[PromptT]:
    """`prompts` by their place in the body; each reference is looked at once."""
    places: dict[str, str] = {}
    for place, prompt in prompts.items():
        for path, url in _references(prompt):
            places.setdefault(url, place + path)
    if not places:
        return list(prompts.values())

    def rewritten() -> list[PromptT]:
        return [_rewritten(prompt, stored, place) for place, prompt in prompts.items()]

    # A thread is slower than a few references, but keeps thousands from stopping all requests.
    many = len(places) > MANY
    if many:
        stored = await asyncio.to_thread(_check_names, here, caller, places)
    else:
        stored = _check_names(here, caller, places)
    stored |= await _look_up(caller, places)
    stored |= await _upload(here, caller, places)
    return await asyncio.to_thread(rewritten) if many else rewritten()


def _references(prompt: Prompt) -> Iterator[tuple[str, str]]:
    """Path and text of every image reference."""
    for index, url in enumerate(prompt.images):
        yield f"images.{index}", url
    for i, message in enumerate(prompt.messages or []):
        if not isinstance(message.content, str):
            for j, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    yield f"messages.{i}.content.{j}.image_url.url", part.image_url.url


def _check_names(here: Services, caller: Caller, places: Mapping[str, str]) -> dict[str, Stored]:
    """The ``s3://`` names and URLs; anything that has no form at all is refused here."""
    stored = {}
    for url, place in places.items():
        if _is_data(url) or _is_id(url):
            continue
        if not url.startswith("s3://") and not is_web(url):
            raise InvalidRequest(
                f"{place}: give an image as `s3://bucket/key`, an `https://` or `data:` URL, or "
                "the id of an upload (`img_...`)",
                param=place,
            )
        try:
            ref = image_ref(url, caller.tenant, here.settings)
        except VisqError as error:
            raise _at(place, error) from None
        stored[url] = Stored(ref.uri)
    return stored


async def _look_up(caller: Caller, places: Mapping[str, str]) -> dict[str, Stored]:
    """The ids of uploads."""
    ids = [url for url in places if _is_id(url)]
    if not ids:
        return {}
    known = await caller.database.read(_images, ids)
    for image_id in ids:
        if image_id not in known:
            raise ImageNotFound(f"there is no upload {image_id}", param=places[image_id])
    return {image_id: Stored(image.uri, image.sha256) for image_id, image in known.items()}


def _images(session: Session, image_ids: Sequence[str]) -> dict[str, Image]:
    found = (reading.image_by_id(session, image_id) for image_id in image_ids)
    return {image.id: image for image in found if image is not None}


async def _upload(here: Services, caller: Caller, places: Mapping[str, str]) -> dict[str, Stored]:
    """The ``data:`` URLs."""
    free = asyncio.Semaphore(UPLOADS_AT_A_TIME)

    async def upload(url: str) -> Stored:
        async with free:
            try:
                data = await asyncio.to_thread(
                    uploads.decode_data_url, url, here.settings.max_upload_bytes
                )
                image = await uploads.store(here, caller, data)
            except VisqError as error:
                raise _at(places[url], error) from None
            return Stored(image.uri, image.sha256)

    urls = [url for url in places if _is_data(url)]
    return dict(zip(urls, await asyncio.gather(*map(upload, urls)), strict=True))


def _rewritten(prompt: PromptT, stored: Mapping[str, Stored], place: str) -> PromptT:
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


def _is_data(url: str) -> bool:
    return url.startswith("data:")


def _is_id(url: str) -> bool:
    return _IMAGE_ID.fullmatch(url) is not None


def _at(place: str, error: VisqError) -> VisqError:
    """The same error, with the place in the body that it is about."""
    return type(error)(f"{place}: {error.message}", param=place)
