"""Rows as the types that the API, Redis and the result events show."""

from __future__ import annotations

from models.tables import Batch, ChatSession, Image, Job, JobEvent, Message, StoredFile
from visq.batch_files import output_names
from visq.types import (
    BatchCounts,
    BatchError,
    BatchErrors,
    BatchStatus,
    BatchUsage,
    BatchView,
    ErrorBody,
    FileView,
    ImageView,
    JobEventView,
    JobResult,
    JobView,
    RequestCounts,
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
    ended_at = {batch.status: batch.finished_at}
    written = None if batch.output_uri is None else output_names(batch.output_uri)
    return BatchView(
        id=batch.id,
        endpoint=batch.endpoint,
        status=batch.status,
        errors=None
        if batch.errors is None
        else BatchErrors(data=[BatchError.model_validate(each) for each in batch.errors]),
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at,
        completed_at=ended_at.get(BatchStatus.COMPLETED),
        failed_at=ended_at.get(BatchStatus.FAILED),
        expired_at=ended_at.get(BatchStatus.EXPIRED),
        cancelling_at=batch.cancelling_at,
        cancelled_at=ended_at.get(BatchStatus.CANCELLED),
        request_counts=RequestCounts(
            total=batch.total,
            completed=batch.succeeded,
            failed=batch.failed + batch.cancelled + batch.expired,
        ),
        usage=BatchUsage(
            input_tokens=batch.prompt_tokens,
            output_tokens=batch.completion_tokens,
            total_tokens=batch.prompt_tokens + batch.completion_tokens,
        ),
        metadata=batch.meta,
        lane=batch.lane,
        counts=counts,
        intake_done=batch.intake_done,
        input_uri=batch.input_uri,
        output_uri=None if written is None else written.output,
        error_uri=None if written is None else written.errors,
        summary_uri=None if written is None else written.summary,
        max_in_flight=batch.max_in_flight,
        on_item_error="stop" if batch.on_item_error == "stop" else "continue",
        dedupe=batch.dedupe,
        result_queue=batch.result_queue,
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


def file_view(file: StoredFile) -> FileView:
    return FileView(
        id=file.id,
        bytes=file.size,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )
