"""``/v1/images``: uploads."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from api import examples, openapi, uploads
from api.auth import Me, authenticated
from api.errors import documented
from api.json_body import capped
from api.services import Here
from models.views import image_view
from visq.errors import (
    ImageForbidden,
    ImageUndecodable,
    MalformedBody,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from visq.types import ImageView

router = APIRouter(prefix="/v1/images", tags=["images"], dependencies=[Depends(authenticated)])

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_FORM: dict[str, Any] = {
    "schema": {
        "type": "object",
        "properties": {"file": _BINARY["schema"]},
        "required": ["file"],
    }
}


@router.post(
    "",
    operation_id="upload_image",
    summary="Upload an image",
    status_code=201,
    responses={
        201: openapi.example(examples.IMAGE),
        **documented(
            ImageUndecodable, ImageForbidden, MalformedBody, PayloadTooLarge, UnsupportedMediaType
        ),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": _FORM, "image/*": _BINARY},
        }
    },
)
async def upload_image(here: Here, me: Me, request: Request) -> ImageView:
    """As the body itself (`Content-Type: image/...`), or as the field `file` of a form. Give the
    `id` or the `uri` in jobs. The same bytes again are the same image."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    chunks = capped(request, here.settings.max_upload_bytes, "the upload")
    if kind == "multipart/form-data":
        data = await uploads.file_of_form(request.headers, chunks)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        data = b"".join([chunk async for chunk in chunks])
    else:
        raise UnsupportedMediaType(
            "send the image as the body with `Content-Type: image/...`, or as the field `file` of "
            "a `multipart/form-data` form"
        )
    return image_view(await uploads.store(here, me, data))
