"""What the API answered, as views and as errors of `visq.errors`."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ValidationError

from visq.errors import JobCancelled, JobExpired, JobFailed, Unavailable, VisqError
from visq.types import ErrorBody, JobResult, JobStatus, JobView


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


def as_error(said: ErrorBody, fallback: type[VisqError]) -> VisqError:
    """The exception with the code of `said`; a code of a later version becomes a `fallback`."""
    for kind in _tree(VisqError):
        if kind.code == said.code:
            return kind(said.message, param=said.param)
    return fallback(f"{said.message} ({said.code})", param=said.param)


def result_of(job: JobView) -> JobResult:
    """The answer of a job that has ended.

    :raises VisqError: why there is none, with the code of the job's error.
    """
    if job.status is JobStatus.SUCCEEDED and job.result is not None:
        return job.result
    if job.status is JobStatus.CANCELLED:
        raise JobCancelled(f"job {job.id} was cancelled")
    if job.status is JobStatus.EXPIRED:
        raise JobExpired(f"job {job.id} expired before it ended")
    if job.error is None:
        raise JobFailed(f"job {job.id} is {job.status} and has no result")
    raise as_error(job.error, JobFailed)


def _tree(kind: type[VisqError]) -> Iterator[type[VisqError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)
