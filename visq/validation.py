"""JSON from outside: read strictly, and with one message for what is wrong with it.

pydantic's own reading takes what PostgreSQL cannot store or what JSON does not know: ``NaN``, NUL
characters, lone surrogates, integers beyond 64 bits, ``"5"`` where a number is meant.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from visq.errors import InvalidRequest, MalformedBody
from visq.types import MAX_INT64

ModelT = TypeVar("ModelT", bound=BaseModel)

Problem = Mapping[str, Any]
"""One error as pydantic reports it: ``type``, ``loc``, ``msg``."""

_SUSPICIOUS: Final = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
"""Escapes that may stand for a NUL or for half of a surrogate pair."""


def parse(model: type[ModelT], data: bytes, what: str = "the body") -> ModelT:
    """Parse JSON as `model`; `what` it is begins the messages.

    :raises MalformedBody: it is not JSON.
    :raises InvalidRequest: it does not fit `model`, or holds what cannot be stored.
    """
    return as_model(model, data, strict_json(data, what), what)


def as_model(model: type[ModelT], data: bytes, value: object, what: str = "the body") -> ModelT:
    """`parse` of JSON whose `value` is known.

    :raises InvalidRequest: it does not fit `model`.
    """
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        if problems[0]["type"] == "json_invalid":
            raise MalformedBody(f"{what} is not JSON: {problems[0]['msg']}") from None
        raise invalid(problems, value) from None


def strict_json(data: bytes, what: str = "the body") -> object:
    """JSON as RFC 8259 has it, with what every part of visq can carry and store."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise MalformedBody(f"{what} is not UTF-8 at byte {error.start}") from None
    try:
        value: object = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, parse_int=_int64
        )
    except json.JSONDecodeError as error:
        raise MalformedBody(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except _NoConstantError as error:
        raise MalformedBody(f"{what} is not JSON: it has no {error}") from None
    except RecursionError:
        raise MalformedBody(f"{what} is nested too deeply") from None
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


class _NoConstantError(Exception):
    """``NaN`` or ``Infinity``."""


def _no_constant(name: str) -> NoReturn:
    raise _NoConstantError(name)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise InvalidRequest("a number is too large")
    return number


def _int64(digits: str) -> int:
    if len(digits) <= 20 and -MAX_INT64 - 1 <= (number := int(digits)) <= MAX_INT64:
        return number
    raise InvalidRequest("an integer does not fit into 64 bits")


def invalid(problems: Sequence[Problem], data: object) -> InvalidRequest:
    """The error for what pydantic found wrong with `data`: its most precise finding.

    Of a union pydantic reports the failure of every branch; the longest path is the branch that
    the sender meant.
    """
    paths = [_path(problem, data) for problem in problems]
    best = max(range(len(problems)), key=lambda index: len(paths[index]))
    message = str(problems[best]["msg"]).removeprefix("Value error, ")
    param = ".".join(paths[best]) or None
    if param is None:
        return InvalidRequest(message)
    return InvalidRequest(f"{param}: {message[:1].lower()}{message[1:]}", param=param)


def _path(problem: Problem, data: Any) -> list[str]:
    """The place of a problem in `data`; pydantic's path also names the branches of unions."""
    path: list[str] = []
    steps = problem["loc"]
    for number, step in enumerate(steps, start=1):
        if _leads_on(step, data):
            data = data[step]
            path.append(str(step))
        elif problem["type"] == "missing" and number == len(steps):
            path.append(str(step))
    return path


def _leads_on(step: object, data: object) -> bool:
    if isinstance(data, dict):
        return step in data
    return isinstance(data, list) and isinstance(step, int) and step < len(data)
