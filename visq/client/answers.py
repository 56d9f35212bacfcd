"""What the API answered, as errors of `visq.errors`."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from visq.ended import as_error
from visq.errors import Unavailable, VisqError
from visq.types import ErrorBody


class _Failure(BaseModel):
    error: ErrorBody


def error_of(status: int, body: bytes) -> VisqError:
    """The error that an answer with this status is."""
    try:
        said = _Failure.model_validate_json(body).error
    except ValidationError:
        # Not from visq: a proxy, or another server.
        kind = Unavailable if status in (429, 502, 503, 504) else VisqError
        return kind(f"the server answered with HTTP status {status}")
    return as_error(said, VisqError)
