"""Rows as the types that the API, Redis and the result events show."""

from __future__ import annotations

from models.tables import Batch, ChatSession, Image, Job, JobEvent, Message
from visq.types import (
    BatchCounts,
    BatchView,
    ErrorBody,
    ImageView,
    JobEventView,
    JobResult,
    JobView,
    SessionView,
    StoredMessage,
)


def job_view(job: Job) -> JobView:
    """The job without ``waiting_for``, which needs a look at others (`models.reading`)."""
    error = None
    if job.error_code is not None:
        error = ErrorBody(
            code=job.error_code, message=job.error_message or "", param=job.error_param
        )
    return JobView(
        id=job.id,
        kind=job.kind,
        status=job.status,
        lane=job.lane,
        session_id=job.session_id,
        turn=job.turn,
        batch_id=job.batch_id,
        custom_id=job.custom_id,
        position=job.position,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        metadata=job.meta,
        result_queue=job.result_queue,
        result=None if job.result is None else JobResult.model_validate(job.result),
        error=error,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        expires_at=job.expires_at,
    )


def event_view(event: JobEvent) -> JobEventView:
    return JobEventView(
        at=event.at,
        from_status=event.from_status,
        to_status=event.to_status,
        attempt=event.attempt,
        worker=event.worker,
        reason=event.reason,
    )


def session_view(session: ChatSession) -> SessionView:
    return SessionView(
        id=session.id,
        turns=session.turns,
        metadata=session.meta,
        forked_from=session.forked_from,
        created_at=session.created_at,
        updated_at=session.updated_at,
    )


def message_view(message: Message) -> StoredMessage:
    return StoredMessage.model_validate(
        {
            "turn": message.turn,
            "role": message.role,
            "content": message.content,
            "job_id": message.job_id,
            "created_at": message.created_at,
        }
    )


def batch_view(batch: Batch) -> BatchView:
    counts = BatchCounts(
        total=batch.total,
        succeeded=batch.succeeded,
        failed=batch.failed,
        cancelled=batch.cancelled,
        expired=batch.expired,
    )
    return BatchView(
        id=batch.id,
        status=batch.status,
        lane=batch.lane,
        counts=counts,
        metadata=batch.meta,
        result_queue=batch.result_queue,
        created_at=batch.created_at,
        finished_at=batch.finished_at,
    )


def image_view(image: Image) -> ImageView:
    return ImageView(
        id=image.id,
        uri=image.uri,
        sha256=image.sha256,
        size=image.size,
        created_at=image.created_at,
    )
