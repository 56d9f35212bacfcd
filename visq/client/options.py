"""What can be said beside the prompt of a job or a batch; the API's fields, typed for Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from pydantic import ValidationError

from visq.client.images import ImageLike
from visq.errors import InvalidRequest
from visq.types import (
    BatchItem,
    BatchRequest,
    ExpiresAfter,
    GenerationConfig,
    JobRequest,
    Json,
    Message,
    NewSession,
    Wire,
)

Images = ImageLike | Sequence[ImageLike]
Item = BatchItem | Mapping[str, Any] | tuple[str, Images]
"""A batch item: its fields (``custom_id`` is its number if not given), or ``(prompt, image)``; or
the fields of a line of OpenAI's batch files."""


class ChatOptions(TypedDict, total=False):
    """Options of one turn of a session."""

    gen_config: GenerationConfig | Mapping[str, Any]
    adapter_name: str | None
    lane: Literal["interactive", "standard", "batch"]
    expires_in: float | None
    """Seconds."""
    metadata: Mapping[str, str]
    result_queue: str | None
    on_image_change: Literal["fail", "accept"]
    idempotency_key: str
    """By default a new one for each call: repeats of the request make one job."""


class JobOptions(ChatOptions, total=False):
    """Options of a job."""

    messages: Sequence[Message | Mapping[str, Any]]
    """OpenAI message dicts, instead of a prompt; their images may be local, too."""
    kind: Literal["chat", "generate"]
    session_id: str | None
    session: NewSession | Mapping[str, Any] | None
    """``{}`` opens a session with this job."""
    do_preprocess: bool


class BatchOptions(TypedDict, total=False):
    """Options of a batch."""

    input_uri: str | None
    """In place of items: ``s3://bucket/in.jsonl`` (``.jsonl.gz``, ``.parquet``), or a prefix of
    images, which ends with ``/``, with ``prompt``."""
    prompt: str | None
    """What to ask of every image under a prefix."""
    input_file_id: str | None
    """In place of items: an upload of ``POST /v1/files``."""
    output_uri: str | None
    """Where the server writes the results in input order."""
    gen_config: GenerationConfig | Mapping[str, Any]
    """For items that have none of their own."""
    lane: Literal["interactive", "standard", "batch"]
    max_in_flight: int | None
    expires_in: float | None
    """Seconds."""
    on_item_error: Literal["continue", "stop"]
    dedupe: bool
    """Do once what several items ask for."""
    metadata: Mapping[str, str]
    result_queue: str | None
    endpoint: Literal["/v1/chat/completions"] | None
    """With ``input_file_id``: write output files in OpenAI's form."""
    completion_window: str | None
    output_expires_after: ExpiresAfter | Mapping[str, Any] | None
    """With ``input_file_id``: when the output files are deleted."""
    idempotency_key: str


def job_body(fields: Json) -> bytes:
    """Check a job's fields and return its JSON.

    :raises InvalidRequest: names the field that does not fit.
    """
    return _checked(JobRequest, fields)


def batch_body(fields: Json) -> bytes:
    """As `job_body`, for a batch."""
    return _checked(BatchRequest, fields)


def item_line(fields: Json, number: int) -> bytes:
    """An item as a line of a file; one in OpenAI's form goes through as it is.

    :raises InvalidRequest: names the field that does not fit.
    """
    if "body" in fields:
        return json.dumps(fields).encode() + b"\n"
    return _checked(BatchItem, fields, f"items.{number}.") + b"\n"


def item_fields(item: Item, number: int) -> Json:
    """The fields of a batch item, whatever form it was given in."""
    if isinstance(item, BatchItem):
        return item.model_dump(mode="json", exclude_unset=True)
    if isinstance(item, tuple):
        prompt, images = item
        return {"custom_id": str(number), "prompt": prompt, "images": images}
    return {"custom_id": str(number), **item}


def _checked(kind: type[Wire], fields: Json, place: str = "") -> bytes:
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = (place + ".".join(str(step) for step in first["loc"])).removesuffix(".") or None
        where = f"{param}: " if param else ""
        raise InvalidRequest(f"{where}{first['msg']}", param=param) from None
    # Only what was given: defaults are the server's.
    return request.model_dump_json(exclude_unset=True).encode()
