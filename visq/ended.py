"""An ended job as a result, or as the exception that says why there is none."""

from __future__ import annotations

from visq.errors import JobCancelled, JobExpired, JobFailed, VisqError, kind_of
from visq.types import ErrorBody, JobResult, JobStatus, JobView


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


def as_error(said: ErrorBody, fallback: type[VisqError]) -> VisqError:
    """The exception with the code of `said`; a code of a later version becomes a `fallback`."""
    kind = kind_of(said.code)
    if kind is None:
        return fallback(f"{said.message} ({said.code})", param=said.param)
    return kind(said.message, param=said.param)
