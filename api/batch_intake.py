"""Where the input of a batch lies, and whether the caller may read it, and write its output."""

from __future__ import annotations

import asyncio

from api.auth import Caller
from api.services import Services
from models import files
from visq.batch_files import has_known_ending, output_names
from visq.errors import ImageForbidden, InvalidRequest, ObjectForbidden, VisqError
from visq.objects import ObjectRef, check_access, parse_uri
from visq.settings import Settings
from visq.types import BatchRequest


async def batch_input(here: Services, caller: Caller, request: BatchRequest) -> str | None:
    """The ``s3://`` name of the input, which is there and may be read; ``None``: the items are in
    the request.

    :raises InvalidRequest: a name has no form that is taken.
    :raises NotFound: there is no such file.
    :raises ObjectForbidden: the caller may not read it, or not write the output.
    :raises Unavailable: the object store does not answer.
    """
    if request.output_uri is not None:
        _check_output(request.output_uri, request.input_uri, caller.tenant, here.settings)
    if request.input_file_id is not None:
        file = await caller.database.read(files.get, request.input_file_id)
        return file.uri
    uri = request.input_uri
    if uri is None:
        return None
    # Of a prefix: as if it were an object below it.
    ref = _parse("input_uri", f"{uri}x" if uri.endswith("/") else uri)
    _check("input_uri", ref, caller.tenant, here.settings)
    if not uri.endswith("/"):
        await asyncio.to_thread(here.store.stat, ref)
    return uri


def _check_output(uri: str, input_uri: str | None, tenant: str, settings: Settings) -> None:
    if not uri.endswith("/") and not has_known_ending(uri):
        raise InvalidRequest(
            "output_uri: end it with `.jsonl`, `.jsonl.gz` or `.parquet`, or with `/`",
            param="output_uri",
        )
    names = output_names(uri)
    for name in (names.output, names.errors, names.summary):
        ref = _parse("output_uri", name)
        if name == input_uri:
            raise InvalidRequest(
                f"output_uri: the output would replace the input, {name}", param="output_uri"
            )
        if ref.bucket == settings.upload_bucket:
            raise ObjectForbidden(
                f"output_uri: bucket `{ref.bucket}` is for uploads; name another one",
                param="output_uri",
            )
        _check("output_uri", ref, tenant, settings)


def _parse(field: str, uri: str) -> ObjectRef:
    try:
        return parse_uri(uri)
    except VisqError as error:
        raise InvalidRequest(f"{field}: {error.message}", param=field) from None


def _check(field: str, ref: ObjectRef, tenant: str, settings: Settings) -> None:
    try:
        check_access(ref, tenant, settings)
    except ImageForbidden:
        raise ObjectForbidden(
            f"{field}: bucket `{ref.bucket}` is not one that this server lets you use here",
            param=field,
        ) from None
