"""Uploads: bytes that are an image, stored once for each content, in the tenant's own part of the
upload bucket. Decoding them is the worker's: here only their first bytes are looked at.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from api.auth import Caller
from api.services import Services
from models import images
from models.tables import Image
from visq.errors import InvalidRequest, MalformedBody
from visq.references import image_type, upload_ref


async def store(here: Services, caller: Caller, data: bytes) -> Image:
    """Store an image; the same bytes again are the same image.

    :raises ImageUndecodable: it is not one of the formats that workers read.
    :raises Unavailable: the object store did not take it.
    """
    content_type = image_type(data)
    sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
    ref = upload_ref(caller.tenant, sha256, here.settings)
    # Also when it is known: whoever empties the bucket need not think of the table.
    await asyncio.to_thread(here.store.put, ref, data, content_type)
    return await caller.database.run(
        images.add, caller.tenant_id, uri=ref.uri, sha256=sha256, size=len(data)
    )


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
