"""How errors leave the API: one shape, stable codes, and the same list in the OpenAPI.

``{"error": {"code", "message", "param", "type"}}``. Every error is a class of `visq.errors`; what
Starlette and pydantic raise is brought into the same shape here.

Routes that speak OpenAI's API have the dependency `as_openai`, the first of their router, and are
`documented` with the face `OPENAI`: their statuses and codes are OpenAI's (`visq.openai.errors`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from visq.errors import (
    IdempotencyConflict,
    InvalidRequest,
    Unauthorized,
    Unavailable,
    VisqError,
)
from visq.openai import errors as openai
from visq.types import ErrorBody, Json
from visq.validation import invalid

log = structlog.get_logger(__name__)

RETRY_AFTER_SECONDS: Final = 2
"""What ``Retry-After`` says while a server that the API needs is away."""


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorBody


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Register the handlers; `routers` are all routers of `app`."""
    app.state.routers = routers
    app.add_exception_handler(VisqError, _on_visq_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_unexpected_error)


@dataclass(frozen=True)
class Face:
    """How a route tells its errors."""

    status_of: Callable[[int], int]
    """The HTTP status for the status of an error's class."""
    body_of: Callable[[str, str, str | None], Json]
    """The body for an error's code, message and param."""


def _body(code: str, message: str, param: str | None) -> Json:
    return {"error": ErrorBody(code=code, message=message, param=param).model_dump()}


OURS: Final = Face(lambda status: status, _body)
OPENAI: Final = Face(openai.status_of, openai.body_of)
BATCHES: Final = Face(openai.status_of, openai.body_in_our_names)
"""As `OPENAI`, for requests whose fields are mostly visq's own."""


def _tells_errors(face: Face) -> Callable[[Request], Awaitable[None]]:
    async def with_face(request: Request) -> None:
        request.state.face = face

    return with_face


as_openai: Final = Depends(_tells_errors(OPENAI))
"""The route tells its errors as OpenAI's API does."""
as_batches: Final = Depends(_tells_errors(BATCHES))
"""The route tells its errors as those of batches are told."""


def add_header(request: Request, name: str, value: str) -> None:
    """If this request is answered with an error, the answer has this header."""
    request.state.error_headers = {**getattr(request.state, "error_headers", {}), name: value}


def documented(*kinds: type[VisqError], face: Face = OURS) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route: these errors, and those that every route may answer with.

    :param face: `OPENAI` if the route has the dependency `as_openai`.
    """
    by_status: dict[int, list[type[VisqError]]] = {}
    everywhere: tuple[type[VisqError], ...] = (Unauthorized, InvalidRequest, Unavailable)
    for kind in dict.fromkeys((*everywhere, *kinds)):
        by_status.setdefault(face.status_of(kind.status), []).append(kind)
    return {status: _described(group, face) for status, group in sorted(by_status.items())}


def _described(kinds: Iterable[type[VisqError]], face: Face) -> dict[str, Any]:
    meanings = {kind: (kind.__doc__ or "").partition("\n")[0] for kind in kinds}
    bodies = [face.body_of(kind.code, meaning, None) for kind, meaning in meanings.items()]
    by_code = {body["error"]["code"]: body for body in bodies}
    said = [f"- `{code}`: {body['error']['message']}" for code, body in by_code.items()]
    return {
        # Not "model": FastAPI would say that an event stream's errors are event streams too.
        "description": "\n".join(said),
        "content": {
            "application/json": {
                "schema": {"$ref": f"#/components/schemas/{ErrorResponse.__name__}"},
                "examples": {code: {"value": body} for code, body in by_code.items()},
            }
        },
    }


def _answer(
    request: Request,
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    face: Face = getattr(request.state, "face", OURS)
    more = getattr(request.state, "error_headers", {})
    body = face.body_of(code, message, param)
    return JSONResponse(body, face.status_of(status), {**(headers or {}), **more})


async def _on_visq_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, VisqError)
    if error.status >= 500:
        log.warning("request failed", code=error.code, error=str(error))
    headers = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        headers["Retry-After-Ms"] = str(1000 * RETRY_AFTER_SECONDS)  # for OpenAI's clients
    if isinstance(error, IdempotencyConflict):
        headers["X-Should-Retry"] = "false"  # OpenAI's clients would try any 409 again
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="visq"'
    return _answer(request, error.status, error.code, error.message, error.param, headers)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """A path, query or header parameter does not fit (bodies: `api.json_body`)."""
    assert isinstance(error, RequestValidationError)
    problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
    # The path to a parameter is its name; there is no data to follow it in.
    names = {str(problem["loc"][0]): None for problem in problems if problem["loc"]}
    return await _on_visq_error(request, invalid(problems, names))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    """The router found no route, or not this method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette names the methods of the first route only
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    code, message = {
        404: ("not_found", "there is no such path; `/docs` lists all of them"),
        405: ("method_not_allowed", "this path does not take this method; see `Allow`"),
    }.get(error.status_code, ("invalid_request", HTTPStatus(error.status_code).phrase))
    return _answer(request, error.status_code, code, message, headers=headers)


def _methods(request: Request) -> set[str]:
    """The methods that the path of this request takes."""
    routes = [route for router in request.app.state.routers for route in router.routes]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in matching for method in route.methods}


async def _on_unexpected_error(request: Request, _error: Exception) -> JSONResponse:
    """A bug. Starlette raises it again after this answer, so the server logs it."""
    return _answer(
        request, 500, "internal_error", "an unexpected error; it was logged on the server"
    )
