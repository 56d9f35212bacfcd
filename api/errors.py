"""How errors leave the API: one shape, stable codes, and the same list in the OpenAPI.

``{"error": {"code", "message", "param"}}``. Every error is a class of `visq.errors`; what Starlette
and pydantic raise is brought into the same shape here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from visq.errors import InvalidRequest, Unauthorized, Unavailable, VisqError
from visq.types import ErrorBody

log = structlog.get_logger(__name__)

RETRY_AFTER_SECONDS: Final = 2
"""What ``Retry-After`` says while a server that the API needs is away."""

Problem = Mapping[str, Any]
"""One error as pydantic reports it: ``type``, ``loc``, ``msg``."""


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


def documented(*kinds: type[VisqError]) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route: these errors, and those that every route may answer with."""
    by_status: dict[int, list[type[VisqError]]] = {}
    everywhere: tuple[type[VisqError], ...] = (Unauthorized, InvalidRequest, Unavailable)
    for kind in dict.fromkeys((*everywhere, *kinds)):
        by_status.setdefault(kind.status, []).append(kind)
    return {status: _described(group) for status, group in sorted(by_status.items())}


def _described(kinds: Iterable[type[VisqError]]) -> dict[str, Any]:
    meanings = {kind.code: (kind.__doc__ or "").partition("\n")[0] for kind in kinds}
    return {
        # Not "model": FastAPI would say that an event stream's errors are event streams too.
        "description": "\n".join(f"- `{code}`: {meaning}" for code, meaning in meanings.items()),
        "content": {
            "application/json": {
                "schema": {"$ref": f"#/components/schemas/{ErrorResponse.__name__}"},
                "examples": {
                    code: {"value": _body(code, meaning, None)}
                    for code, meaning in meanings.items()
                },
            }
        },
    }


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


def _body(code: str, message: str, param: str | None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "param": param}}


def _answer(
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(_body(code, message, param), status, headers)


async def _on_visq_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, VisqError)
    if error.status >= 500:
        log.warning("request failed", code=error.code, error=str(error))
    headers = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="visq"'
    return _answer(error.status, error.code, error.message, error.param, headers)


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
    return _answer(error.status_code, code, message, headers=headers)


def _methods(request: Request) -> set[str]:
    """The methods that the path of this request takes."""
    routes = [route for router in request.app.state.routers for route in router.routes]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in matching for method in route.methods}


async def _on_unexpected_error(_request: Request, _error: Exception) -> JSONResponse:
    """A bug. Starlette raises it again after this answer, so the server logs it."""
    return _answer(500, "internal_error", "an unexpected error; it was logged on the server")
