"""The items of a batch, of any number: in the body of the request, or in a file before it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import BinaryIO, Final

from visq.client import options
from visq.client.flows import Flow, Request
from visq.client.images import with_uploads
from visq.types import FileView, Json

INLINE_ITEMS: Final = 10_000
"""More of them go as a file."""
INLINE_BYTES: Final = 16 * 1024 * 1024

CHUNK: Final = 500
"""Items whose images are uploaded before they are written to the file."""

FILE_SECONDS: Final = 30 * 86_400
"""After which the server deletes the files that were made here."""

UPLOAD_SECONDS: Final = 600.0
DRY_RUN_SECONDS: Final = 600.0
"""How long the server may read a file."""


@dataclass(frozen=True)
class BatchBody:
    """The body of a request, and the file that was uploaded for it."""

    data: bytes
    file_id: str | None = None


def batch_body(items: Iterable[options.Item] | None, fields: Json) -> Flow[BatchBody]:
    """Upload the local images of `items`, and if need be the items themselves.

    :raises InvalidRequest: names the field that does not fit.
    """
    if items is None:
        return BatchBody(options.batch_body(fields))
    numbered = (options.item_fields(item, number) for number, item in enumerate(items))
    first = list(islice(numbered, INLINE_ITEMS))
    more = list(islice(numbered, 1))
    if not more and not any("body" in item for item in first):
        first = yield from with_uploads(first)
        body = options.batch_body({**fields, "items": first})
        if len(body) <= INLINE_BYTES:
            return BatchBody(body)
    file_id = yield from _upload(chain(first, more, numbered))
    named = {**fields, "input_file_id": file_id}
    if named.get("output_uri") is None:
        named.setdefault("output_expires_after", {"anchor": "created_at", "seconds": FILE_SECONDS})
    return BatchBody(options.batch_body(named), file_id)


def _upload(items: Iterator[Json]) -> Flow[str]:
    """The id of a file with these items."""
    uploaded: dict[object, str] = {}
    with tempfile.TemporaryFile() as file:
        number = 0
        while chunk := list(islice(items, CHUNK)):
            for item in (yield from with_uploads(chunk, uploaded)):
                file.write(options.item_line(item, number))
                number += 1
        file.flush()
        return (yield from upload_file("items.jsonl", file))


def upload_file(name: str, file: BinaryIO) -> Flow[str]:
    """The id of a file of items that was uploaded."""
    answer = yield Request(
        "POST",
        "/v1/files",
        file=(name, file),
        form={
            "purpose": "batch",
            "expires_after[anchor]": "created_at",
            "expires_after[seconds]": str(FILE_SECONDS),
        },
        answer_seconds=UPLOAD_SECONDS,
    )
    return FileView.model_validate_json(answer.body).id
