"""What `/docs` says: the description, the tags, and the bodies that `api.json_body` reads."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from visq import __version__
from visq.openai.requests import ChatCompletionRequest
from visq.types import BatchRequest, JobRequest, NewSession

TITLE: Final = "visq"

SUMMARY: Final = "Vision-language models behind a message queue."

DESCRIPTION: Final = """
Submit a prompt with images as a **job**; a worker with the model already loaded answers it.
A job that got a `202` reaches exactly one end, whatever process or server dies in between.

```sh
curl -sS -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \\
     -H 'Prefer: wait=30' \\
     -d '{"prompt": "How many circles are there?", "images": ["s3://pictures/shapes.png"]}' \\
     http://127.0.0.1:8710/v1/jobs
```

* **Wait** with `Prefer: wait=N` at submission, with `GET /v1/jobs/{job_id}?wait=N`, or follow the
  answer token by token at `GET /v1/jobs/{job_id}/events`.
* **Continue** a conversation: open it with `"session": {}` and give its `session_id` from then on.
  Turns of a session run in the order in which they were submitted.
* **Batches** hold up to 10,000 items; their results can be read while the rest is running.
* **Images** are `s3://bucket/key[?versionId=...]`, `https://` or `data:` URLs, or ids of uploads
  (`img_...`).
* **Repeat safely** with an `Idempotency-Key`: the same request with the same key is one job.

Clients of OpenAI's API work with this base URL: `/v1/chat/completions` and `/v1/models`.

Every error is `{"error": {"code", "message", "param", "type"}}`: programs branch on `code`, which
is stable; `message` says what is wrong; `param` names the field. A job that failed carries the same
in `error`. What clients of OpenAI's API use (chat, models) answers with its statuses and codes.

Times are UTC; ids sort by creation. Lists are paged: give `next_cursor` as `cursor`.
"""

TAGS: Final = [
    {"name": "jobs", "description": "One prompt, one answer."},
    {"name": "sessions", "description": "Conversations: the turns of a session in order."},
    {"name": "batches", "description": "Many prompts at once, at low priority."},
    {"name": "images", "description": "Uploads, for callers without an object store."},
    {"name": "files", "description": "Files of any size, for clients of OpenAI's API."},
    {"name": "chat", "description": "Chat completions, for clients of OpenAI's API."},
    {"name": "models", "description": "What the live workers serve."},
    {"name": "health", "description": "For load balancers and people on call; needs no key."},
]

BODIES: Final[tuple[type[BaseModel], ...]] = (
    JobRequest,
    BatchRequest,
    NewSession,
    ChatCompletionRequest,
)
"""Types that `json_body` reads: FastAPI does not know of them."""


def body(
    model: type[BaseModel], examples: dict[str, Any], *, required: bool = True
) -> dict[str, Any]:
    """``openapi_extra`` of a route whose body is read by `json_body`."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    named = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": schema, "examples": named}}
    return {"requestBody": {"required": required, "content": content}}


def example(value: object, *, location: bool = False) -> dict[str, Any]:
    """Part of ``responses``: an example of a success; `location`: with a ``Location`` header."""
    described: dict[str, Any] = {"content": {"application/json": {"example": value}}}
    if location:
        schema = {"type": "string", "format": "uri-reference"}
        described["headers"] = {"Location": {"schema": schema, "description": "Where it is."}}
    return described


def examples(named: dict[str, Any]) -> dict[str, Any]:
    """Part of ``responses``: several examples of an answer, by what they show."""
    shown = {name: {"value": value} for name, value in named.items()}
    return {"content": {"application/json": {"examples": shown}}}


def install(app: FastAPI, *more: type[BaseModel]) -> None:
    """Make `app` describe itself so; `more` are further types that FastAPI does not know of."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app, (*BODIES, *more))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's own way


def _described(app: FastAPI, hidden: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    document = get_openapi(
        title=TITLE,
        version=__version__,
        summary=SUMMARY,
        description=DESCRIPTION,
        routes=app.routes,
        tags=TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]  # FastAPI's own: this API answers otherwise
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    _, definitions = models_json_schema(
        [(model, "validation") for model in hidden],
        ref_template="#/components/schemas/{model}",
    )
    # What both know (messages, for one) is the same class, which FastAPI writes a little shorter.
    document["components"]["schemas"] = definitions["$defs"] | document["components"]["schemas"]
    return document
