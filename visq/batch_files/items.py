"""Items as lines of files: visq's form, which is that of ``items`` in a request, and OpenAI's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from visq.batch_files.lines import Line
from visq.errors import InvalidRequest, LineTooLong, VisqError
from visq.openai.requests import ChatCompletionRequest, check_model, to_prompt
from visq.references import check_answerable
from visq.types import BatchItem, Wire
from visq.validation import as_model, strict_json


class RequestLine(Wire):
    """A line of OpenAI's batch files."""

    custom_id: Annotated[str, Field(min_length=1, max_length=128)]
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions"]
    body: ChatCompletionRequest
    after: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """visq's own: `BatchItem.after`."""


_NOT_OF_ITEMS: Final = {
    "stream": "a batch has no streams",
    "lane": "all items of a batch are in one lane: say it of the batch",
    "expires_in": "all items of a batch expire together: say it of the batch",
}


class ItemError(Exception):
    """A line is no item that can be asked."""

    def __init__(self, error: VisqError, custom_id: str | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.custom_id = custom_id


def item_of(line: Line, *, models: Collection[str] | None = None) -> BatchItem:
    """The item of a line.

    :param models: those that are served; ``None``: nobody knows.
    :raises ItemError: it is none; the error names the line.
    """
    value: object = None
    try:
        if line.data is None:
            raise LineTooLong("it is longer than lines may be (VISQ_MAX_LINE_BYTES)")
        value = strict_json(line.data, "it")
        if not isinstance(value, dict):
            raise InvalidRequest("it is not a JSON object")
        if line.fault is not None:
            raise InvalidRequest(line.fault)
        return _item(line.data, value, models)
    except VisqError as error:
        named = type(error)(f"line {line.number}: {error.message}", param=error.param)
        raise ItemError(named, _custom_id(value)) from None


def _item(data: bytes, value: dict[str, Any], models: Collection[str] | None) -> BatchItem:
    if "body" not in value:
        item = as_model(BatchItem, data, value, "it")
    else:
        item = _asked(as_model(RequestLine, data, value, "it"), models)
    check_answerable(item.gen_config)
    return item


def _asked(line: RequestLine, models: Collection[str] | None) -> BatchItem:
    """The item that a line of OpenAI's asks for."""
    body = line.body
    for field, why in _NOT_OF_ITEMS.items():
        if getattr(body, field):
            raise InvalidRequest(f"body.{field}: {why}", param=f"body.{field}")
    if [body.session_id, body.session, line.after].count(None) < 2:
        raise InvalidRequest(
            "give one of `body.session_id`, `body.session` and `after`, not several", param="body"
        )
    try:
        check_model(body.model, models)
        prompt = to_prompt(body)
    except VisqError as error:
        raise type(error)(error.message, param=f"body.{error.param}") from None
    return BatchItem(
        custom_id=line.custom_id,
        messages=prompt.messages,
        gen_config=prompt.gen_config,
        adapter_name=prompt.adapter_name,
        session_id=body.session_id,
        session=body.session,
        after=line.after,
        metadata=body.metadata or {},
    )


def _custom_id(value: object) -> str | None:
    """Whose item it is, if it says so in a form that can be kept."""
    found = value.get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) and 0 < len(found) <= 128 else None
