"""What a request may ask of a queue; and its image references, checked and made durable before the
job is accepted.

``s3://`` names and ``https://`` URLs are checked and not fetched; ``data:`` URLs become uploads, so
that a session's history can show them again; ids of uploads become their ``s3://`` names. What a
worker sees is ``s3://`` names and URLs only, and the SHA-256 wherever the bytes are known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import BaseModel
from sqlalchemy.orm import Session

from api import uploads
from api.auth import Caller
from api.services import Services
from models import reading
from models.submit import body_fingerprint
from models.tables import Image
from visq.errors import ImageNotFound, VisqError
from visq.references import (
    PromptT,
    Stored,
    at_place,
    check_answerable,
    check_names,
    decode_data_url,
    is_data,
    is_id,
    references,
    rewritten,
)
from visq.types import BatchRequest, JobRequest

UPLOADS_AT_A_TIME: Final = 4
"""Of the ``data:`` URLs of one request."""
MANY: Final = 100


async def resolve_job(here: Services, caller: Caller, request: JobRequest) -> JobRequest:
    """The request with durable image references.

    :raises UnsupportedParameter: it asks for what cannot come back through a queue.
    :raises InvalidRequest: a reference has none of the forms that are taken.
    :raises ImageError: an image is unknown, not the tenant's to read, or not an image.
    :raises Unavailable: the object store did not take an image.
    """
    check_answerable(request.gen_config)
    [resolved] = await _resolve(here, caller, {"": request})
    return resolved


async def resolve_batch(here: Services, caller: Caller, request: BatchRequest) -> BatchRequest:
    """As `resolve_job`, for every item."""
    check_answerable(request.gen_config)
    if request.items is None:
        return request  # they are looked at when the file is read
    prompts = {f"items.{index}.": item for index, item in enumerate(request.items)}
    for place, item in prompts.items():
        check_answerable(item.gen_config, place)
    items = await _resolve(here, caller, prompts)
    return request.model_copy(update={"items": items})


async def fingerprint(request: BaseModel, idempotency_key: str | None) -> str:
    """What a repeat of the key must equal: the body as the client sent it."""
    if idempotency_key is None:
        return ""
    return await asyncio.to_thread(body_fingerprint, request)


async def _resolve(here: Services, caller: Caller, prompts: Mapping[str, PromptT]) -> list[PromptT]:
    """`prompts` by their place in the body; each reference is looked at once."""
    places: dict[str, str] = {}
    for place, prompt in prompts.items():
        for path, url in references(prompt):
            places.setdefault(url, place + path)
    if not places:
        return list(prompts.values())

    def as_seen() -> list[PromptT]:
        return [rewritten(prompt, stored, place) for place, prompt in prompts.items()]

    # A thread is slower than a few references, but keeps thousands from stopping all requests.
    many = len(places) > MANY
    if many:
        stored = await asyncio.to_thread(check_names, places, caller.tenant, here.settings)
    else:
        stored = check_names(places, caller.tenant, here.settings)
    stored |= await _look_up(caller, places)
    stored |= await _upload(here, caller, places)
    return await asyncio.to_thread(as_seen) if many else as_seen()


async def _look_up(caller: Caller, places: Mapping[str, str]) -> dict[str, Stored]:
    """The ids of uploads."""
    ids = [url for url in places if is_id(url)]
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
                data = await asyncio.to_thread(decode_data_url, url, here.settings.max_upload_bytes)
                image = await uploads.store(here, caller, data)
            except VisqError as error:
                raise at_place(places[url], error) from None
            return Stored(image.uri, image.sha256)

    urls = [url for url in places if is_data(url)]
    return dict(zip(urls, await asyncio.gather(*map(upload, urls)), strict=True))
