"""``/v1/files``: files of any size, in OpenAI's form. Their bytes pass through, to the object store
and from it; the row of a file is made when its object is whole."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from api import examples, openapi
from api.auth import Me, authenticated
from api.errors import OPENAI, as_openai, documented
from api.fields import Parameters
from api.files import StoreWriter, open_object
from api.form_stream import OVERHEAD_BYTES, FormStream
from api.json_body import capped
from api.services import Here
from models import files
from models.views import file_view
from visq.errors import (
    InvalidRequest,
    MalformedBody,
    NotFound,
    ObjectForbidden,
    ObjectNotFound,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from visq.ids import new_id
from visq.objects import parse_uri
from visq.references import file_ref
from visq.types import DeletedFile, ExpiresAfter, FileList, FileView
from visq.validation import invalid

router = APIRouter(
    prefix="/v1/files", tags=["files"], dependencies=[as_openai, Depends(authenticated)]
)

FileIdPath = Annotated[str, Path(examples=[examples.FILE_ID])]

MAX_FILENAME: Final = 255

_PART_OF_OBJECT: Final = re.compile(r"(\w+)\[(\w+)\]")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f]")


class FileForm(BaseModel):
    """The fields of an upload beside the file."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    purpose: Literal["batch", "vision", "user_data"]
    expires_after: ExpiresAfter | None = None
    """`expires_after[anchor]` (`created_at`) and `expires_after[seconds]`. By default a file stays
    until it is deleted."""


class FilesPage(Parameters):
    after: Annotated[str, Field(max_length=64)] | None = None
    """`last_id` of the page before."""
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    """By the time of the upload."""
    purpose: Annotated[str, Field(max_length=32)] | None = None


def _form() -> dict[str, Any]:
    """The form in the OpenAPI."""
    field = {"type": "string"}
    return {
        "schema": {
            "type": "object",
            "properties": {
                "file": {"type": "string", "format": "binary"},
                "purpose": {**field, "enum": ["batch", "vision", "user_data"]},
                "expires_after[anchor]": {**field, "enum": ["created_at"]},
                "expires_after[seconds]": {
                    "type": "integer",
                    "minimum": 3600,
                    "maximum": 2_592_000,
                },
            },
            "required": ["file", "purpose"],
        }
    }


@router.post(
    "",
    operation_id="upload_file",
    summary="Upload a file",
    responses={
        200: openapi.example(examples.FILE),
        **documented(
            ObjectForbidden, MalformedBody, PayloadTooLarge, UnsupportedMediaType, face=OPENAI
        ),
    },
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": _form()}}},
)
async def upload_file(here: Here, me: Me, request: Request) -> FileView:
    """As a form; up to `VISQ_MAX_FILE_BYTES`. The file is there whole or not at all."""
    limit = here.settings.max_file_bytes
    form = FormStream(request.headers.get("content-type", ""))
    file_id = new_id("fil")
    ref = file_ref(me.tenant, file_id, here.settings)
    size = 0
    async with StoreWriter(here.store, ref, "application/octet-stream") as writer:
        async for chunk in capped(request, limit + OVERHEAD_BYTES, "the upload"):
            data = form.feed(chunk)
            size += len(data)
            if size > limit:
                raise PayloadTooLarge(f"the file is larger than {limit} bytes", param="file")
            await writer.write(data)
        filename = _checked_name(form.end())
        fields = _fields(form.fields)
    row = await me.database.run(
        files.add,
        me.tenant_id,
        file_id=file_id,
        filename=filename,
        purpose=fields.purpose,
        uri=ref.uri,
        size=size,
        expires_in=fields.expires_after.seconds if fields.expires_after else None,
    )
    return file_view(row)


@router.get("", operation_id="list_files", summary="List files", responses=documented(face=OPENAI))
async def list_files(me: Me, page: Annotated[FilesPage, Query()]) -> FileList:
    rows = await me.database.read(
        files.list_files,
        after=page.after,
        oldest_first=page.order == "asc",
        purpose=page.purpose,
        limit=page.limit + 1,
    )
    data = [file_view(row) for row in rows[: page.limit]]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(rows) > page.limit,
    )


@router.get(
    "/{file_id}",
    operation_id="get_file",
    summary="Look at a file",
    responses={200: openapi.example(examples.FILE), **documented(NotFound, face=OPENAI)},
)
async def get_file(me: Me, file_id: FileIdPath) -> FileView:
    return file_view(await me.database.read(files.get, file_id))


@router.get(
    "/{file_id}/content",
    operation_id="get_file_content",
    summary="The bytes of a file",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            }
        },
        **documented(NotFound, ObjectNotFound, ObjectForbidden, face=OPENAI),
    },
)
async def get_content(here: Here, me: Me, file_id: FileIdPath) -> StreamingResponse:
    """A connection that ends before all bytes of `Content-Length` have come has failed."""
    row = await me.database.read(files.get, file_id)
    size, pieces = await open_object(here.store, parse_uri(row.uri))
    headers = {
        "Content-Length": str(size),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(row.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(pieces, headers=headers, media_type="application/octet-stream")


@router.delete(
    "/{file_id}",
    operation_id="delete_file",
    summary="Delete a file",
    responses=documented(NotFound, ObjectForbidden, face=OPENAI),
)
async def delete_file(here: Here, me: Me, file_id: FileIdPath) -> DeletedFile:
    """Its bytes go too, unless they lie where a batch was told to write them (`output_uri`)."""
    row = await me.database.read(files.get, file_id)
    ref = parse_uri(row.uri)
    if ref.bucket == here.settings.upload_bucket:
        # First: what fails here can be repeated.
        await run_in_threadpool(here.store.delete, ref)
    await me.database.run(files.remove, file_id)
    return DeletedFile(id=file_id)


def _checked_name(filename: str) -> str:
    """:raises InvalidRequest: no file should be named so."""
    if not filename or len(filename) > MAX_FILENAME or _UNPRINTABLE.search(filename):
        raise InvalidRequest(
            f"the file's name has 1 to {MAX_FILENAME} characters, no control characters among them",
            param="file",
        )
    return filename


def _fields(fields: dict[str, str]) -> FileForm:
    """:raises InvalidRequest: a field is missing, unknown or wrong."""
    plain: dict[str, Any] = {}
    objects: dict[str, dict[str, str]] = {}
    for name, value in fields.items():
        if part := _PART_OF_OBJECT.fullmatch(name):  # so OpenAI's client sends objects
            objects.setdefault(part[1], {})[part[2]] = value
        else:
            plain[name] = value
    values = {**plain, **objects}
    try:
        return FileForm.model_validate(values)
    except ValidationError as error:
        raise invalid(error.errors(), values) from None
