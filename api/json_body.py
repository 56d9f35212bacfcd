"""Reading bodies: with a cap on their size, and JSON strictly (`visq.validation`)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from api.services import services
from visq.errors import MalformedBody, PayloadTooLarge, UnsupportedMediaType
from visq.validation import parse

ModelT = TypeVar("ModelT", bound=BaseModel)

LARGE: Final = 256 * 1024
"""Bytes from which a body is parsed in a thread, so that other requests go on."""

_JSON_TYPE = re.compile(r"application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)


def json_body(model: type[ModelT], *, optional: bool = False) -> Callable[..., Awaitable[ModelT]]:
    """The dependency that reads the body as `model`; `optional`: no body means ``{}``."""

    async def read(request: Request) -> ModelT:
        limit = services(request).settings.max_body_bytes
        data = b"".join([chunk async for chunk in capped(request, limit, "the body")])
        if optional and not data:
            return model()
        if not _JSON_TYPE.fullmatch(request.headers.get("content-type", "")):
            raise UnsupportedMediaType("send JSON, with `Content-Type: application/json`")
        if len(data) < LARGE:
            return parse(model, data)
        return await asyncio.to_thread(parse, model, data)

    return read


async def capped(request: Request, limit: int, what: str) -> AsyncGenerator[bytes, None]:
    """The chunks of the body, of which no more than `limit` bytes are read.

    :raises PayloadTooLarge: it is larger, by its own word or in fact.
    """
    too_large = PayloadTooLarge(f"{what} is larger than {limit} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            yield chunk
    except ClientDisconnect:
        raise MalformedBody(f"the connection ended before {what}") from None
