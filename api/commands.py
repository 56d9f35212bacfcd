"""What routes tell the system to do with jobs: the change in the database, and what is to be
published of it."""

from __future__ import annotations

from pydantic import BaseModel

from api.auth import Caller
from api.intake import fingerprint, resolve_job
from api.services import Services
from models import jobs
from models.submit import submit_job
from models.tables import Job
from visq import points
from visq.types import JobRequest


async def submit(
    here: Services,
    caller: Caller,
    request: JobRequest,
    *,
    sent: BaseModel,
    idempotency_key: str | None,
) -> Job:
    """Accept a job, or find the one that an earlier request with the same key made.

    :param sent: the body as the client sent it, which a repeat of the key must equal.
    :raises VisqError: as `resolve_job` and `submit_job`.
    """
    wanted = await fingerprint(sent, idempotency_key)
    request = await resolve_job(here, caller, request)
    submitted = await caller.database.run(
        submit_job,
        caller.tenant_id,
        request,
        max_attempts=here.settings.max_attempts,
        idempotency_key=idempotency_key,
        fingerprint=wanted,
    )
    points.reached("submit.accepted")
    await here.delivery.parcel(submitted.queued)
    points.reached("submit.answering")
    return submitted.job


async def cancel(here: Services, caller: Caller, job_id: str) -> Job:
    """Cancel a job: at once, or, if it runs, a moment later.

    :raises NotFound: no such job.
    """
    transition = await caller.database.run(jobs.cancel, job_id)
    await here.delivery.transitions([transition])
    return transition.job
