"""Uploads: bytes that are an image, stored once for each content, in the tenant's own part of the
upload bucket. Decoding them is the worker's: here only their first bytes are looked at.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from api.auth import Caller
from api.services import Services
from models import images
from models.tables import Image
from visq.errors import ImageTooLarge, ImageUndecodable, InvalidRequest, MalformedBody
from visq.objects import ObjectRef

_DATA_URL = re.compile(r"data:image/[\w.+-]{1,64};base64,", re.ASCII)

_MAGIC: Final = {
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "image/bmp": re.compile(rb"BM"),
}


async def store(here: Services, caller: Caller, data: bytes) -> Image:
    """Store an image; the same bytes again are the same image.

    :raises ImageUndecodable: it is not one of the formats that workers read.
    :raises Unavailable: the object store did not take it.
    """
    content_type = image_type(data)
    sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
    ref = ObjectRef(here.settings.upload_bucket, f"{caller.tenant}/{sha256}")
    # Also when it is known: whoever empties the bucket need not think of the table.
    await asyncio.to_thread(here.store.put, ref, data, content_type)
    return await caller.database.run(
        images.add, caller.tenant_id, uri=ref.uri, sha256=sha256, size=len(data)
    )


def image_type(data: bytes) -> str:
    """:raises ImageUndecodable: the bytes do not begin like an image."""
    for content_type, magic in _MAGIC.items():
        if magic.match(data):
            return content_type
    kinds = ", ".join(content_type.removeprefix("image/").upper() for content_type in _MAGIC)
    raise ImageUndecodable(f"this is not an image in a format that is read ({kinds})")


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a ``data:image/...;base64,`` URL.

    :raises InvalidRequest: it is not one.
    :raises ImageTooLarge: it has more than `max_bytes`.
    :raises ImageUndecodable: its base64 is broken.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise InvalidRequest("a `data:` URL must begin like `data:image/png;base64,`")
    text = url[head.end() :]
    if len(text) > (max_bytes + 2) // 3 * 4:
        raise ImageTooLarge(f"the image in the `data:` URL has more than {max_bytes} bytes")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise ImageUndecodable(f"the base64 of the `data:` URL is broken: {error}") from None


async def file_of_form(headers: Headers, chunks: AsyncIterator[bytes]) -> bytes:
    """The field ``file`` of a multipart form.

    :raises MalformedBody: it is not a multipart form.
    :raises InvalidRequest: it has no file of this name.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        async for chunk in chunks:
            yield chunk
        yield b""

    try:
        form = await MultiPartParser(headers, stream(), max_files=1, max_fields=16).parse()
    except (MultiPartException, KeyError) as error:
        raise MalformedBody(f"the form cannot be read: {error}") from None
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("the form has no file in its field `file`", param="file")
        return await file.read()
    finally:
        await form.close()
