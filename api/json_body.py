"""Reading bodies: with a cap on their size, and JSON strictly.

FastAPI's own reading takes what PostgreSQL cannot store or what JSON does not know: ``NaN``, NUL
characters, lone surrogates, integers beyond 64 bits, ``"5"`` where a number is meant.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from api.errors import invalid
from api.services import services
from visq.errors import InvalidRequest, MalformedBody, PayloadTooLarge, UnsupportedMediaType
from visq.types import MAX_INT64

ModelT = TypeVar("ModelT", bound=BaseModel)

LARGE: Final = 256 * 1024
"""Bytes from which a body is parsed in a thread, so that other requests go on."""

_SUSPICIOUS = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
"""Escapes that may stand for a NUL or for half of a surrogate pair."""

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


def parse(model: type[ModelT], data: bytes) -> ModelT:
    """Parse JSON as `model`.

    :raises MalformedBody: it is not JSON.
    :raises InvalidRequest: it does not fit `model`, or holds what cannot be stored.
    """
    value = strict_json(data)
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        if problems[0]["type"] == "json_invalid":
            raise MalformedBody(f"the body is not JSON: {problems[0]['msg']}") from None
        raise invalid(problems, value) from None


def strict_json(data: bytes) -> object:
    """JSON as RFC 8259 has it, with what every part of visq can carry and store."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not UTF-8 at byte {error.start}") from None
    try:
        value: object = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, parse_int=_int64
        )
    except json.JSONDecodeError as error:
        raise MalformedBody(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    if _SUSPICIOUS.search(text):
        _check_strings(value)
    return value


def _check_strings(value: object) -> None:
    """Look at every string; without recursion, as the nesting is the sender's choice."""
    remaining: list[Any] = [value]
    while remaining:
        match remaining.pop():
            case str(text):
                if "\0" in text:
                    raise InvalidRequest("text cannot hold the character U+0000")
                if not text.isascii() and not _is_unicode(text):
                    raise InvalidRequest("text cannot hold half of a surrogate pair")
            case list(items):
                remaining.extend(items)
            case dict(pairs):
                remaining.extend(pairs)
                remaining.extend(pairs.values())


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise MalformedBody(f"the body is not JSON: it has no {name}")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise InvalidRequest("a number is too large")
    return number


def _int64(digits: str) -> int:
    if len(digits) <= 20 and -MAX_INT64 - 1 <= (number := int(digits)) <= MAX_INT64:
        return number
    raise InvalidRequest("an integer does not fit into 64 bits")
