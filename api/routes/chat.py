"""``/v1/chat/completions``: OpenAI's API over jobs."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request, Response

from api import commands, examples, openapi
from api.auth import Me, authenticated
from api.chat import Chat
from api.errors import OPENAI, as_openai, documented
from api.fields import IdempotencyKey
from api.json_body import json_body
from api.routes.jobs import SUBMIT_ERRORS
from api.services import Here
from models.views import job_view
from visq.errors import (
    AdapterNotFound,
    AttemptsExhausted,
    ContextLengthExceeded,
    EngineError,
    JobCancelled,
    JobExpired,
    ModelNotFound,
    NotFound,
)
from visq.openai.requests import ChatCompletionRequest, check_model, to_job
from visq.types import JobRequest

router = APIRouter(
    prefix="/v1/chat/completions", tags=["chat"], dependencies=[as_openai, Depends(authenticated)]
)

_COMPLETION: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "chat.completion"},
        "choices": {"type": "array", "items": {"type": "object"}},
        "usage": {"type": "object"},
    },
    "required": ["id", "object", "created", "model", "choices", "usage"],
}
_CHUNK: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
}


@router.post(
    "",
    operation_id="create_chat_completion",
    summary="Chat as with OpenAI's API",
    response_class=Response,
    responses={
        200: {
            "description": "The answer; with `stream: true`, `data: {chunk}` for each piece of it "
            'and `data: [DONE]`. What fails after the first piece is `data: {"error": ...}`. '
            "`X-Request-Id` is the id of the job.",
            "content": {
                "application/json": {"schema": _COMPLETION, "example": examples.COMPLETION},
                "text/event-stream": {"schema": _CHUNK, "example": examples.CHUNKS},
            },
        },
        **documented(
            ModelNotFound,
            NotFound,
            *SUBMIT_ERRORS,
            ContextLengthExceeded,
            AdapterNotFound,
            EngineError,
            AttemptsExhausted,
            JobCancelled,
            JobExpired,
            face=OPENAI,
        ),
    },
    openapi_extra=openapi.body(ChatCompletionRequest, examples.CHAT_BODIES),
)
async def create(
    here: Here,
    me: Me,
    connection: Request,
    asked: Annotated[ChatCompletionRequest, Depends(json_body(ChatCompletionRequest))],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """The chat is a job of the lane `interactive`: it waits until it is answered, however long
    that takes. A client that hangs up cancels the job, unless it has given an `Idempotency-Key`."""
    request = to_job(asked)
    check_model(asked.model, await here.workers.models())
    job = await commands.submit(
        here, me, _seeded(request), sent=asked, idempotency_key=idempotency_key
    )
    keep = idempotency_key is not None
    return await Chat(here, me, connection, asked, job_view(job), keep=keep).answer()


def _seeded(request: JobRequest) -> JobRequest:
    """With a seed, if it samples without one: then another attempt, after the death of a worker,
    says the same again, and a stream goes on where it was."""
    config = request.gen_config
    if not config.do_sample or config.random_seed is not None:
        return request
    seeded = config.model_copy(update={"random_seed": secrets.randbits(63)})
    return request.model_copy(update={"gen_config": seeded})
