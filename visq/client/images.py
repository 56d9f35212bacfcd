"""Images as a Python program has them: paths, bytes, open files and PIL images.

Wherever the client takes an image, these are uploaded and replaced by the id of the upload.
References that the API knows (``s3://...``, ``data:...``, ``img_...``) go through as they are.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from visq.client.flows import Flow, Request, Together
from visq.errors import ImageError, ImageNotFound, InvalidRequest
from visq.types import ImageView, Json, Message

_REFERENCE: Final = re.compile(r"data:|img_[0-9a-f]{32}$|[a-zA-Z][a-zA-Z0-9+.-]*://")


class OpenFile(Protocol):
    """A file opened for reading bytes."""

    def read(self, size: int = -1, /) -> bytes: ...


@runtime_checkable
class PilImage(Protocol):
    """What is used of ``PIL.Image.Image``; Pillow itself is not needed to be installed."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None: ...


ImageLike = str | os.PathLike[str] | bytes | OpenFile | PilImage
"""A reference, or a local image to upload: a path, the bytes of a file, an open file, PIL."""


def upload(image: ImageLike) -> Flow[ImageView]:
    """Upload one image. The same bytes give the same upload.

    :raises ImageNotFound: the path does not lead to a file.
    """
    answer = yield Request("POST", "/v1/images", file=_read(image), answer_seconds=60)
    return ImageView.model_validate_json(answer.body)


def with_uploads(
    bodies: Sequence[Json], known: dict[object, str] | None = None
) -> Flow[list[Json]]:
    """`bodies` (of jobs or batch items) with each local image uploaded, the same one once.

    :param known: ids of paths that were uploaded before; those that are uploaded here are added.
    """
    local: dict[object, ImageLike] = {}
    known = {} if known is None else known

    def note(image: ImageLike) -> str:
        if not is_reference(image) and _identity(image) not in known:
            local[_identity(image)] = image
        return ""

    for body in bodies:
        map_images(body, note)
    views: list[ImageView] = yield Together([upload(image) for image in local.values()])
    new = {identity: view.id for identity, view in zip(local, views, strict=True)}
    # An `id` may be another object's later; a path stays what it is.
    known |= {identity: id_ for identity, id_ in new.items() if isinstance(identity, str)}
    ids = known | new
    return [
        map_images(body, lambda image: ids.get(_identity(image)) or str(image)) for body in bodies
    ]


def is_reference(image: object) -> bool:
    """Whether `image` is a name that goes to the API as it is."""
    return isinstance(image, str) and _REFERENCE.match(image) is not None


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """`images` as a list: a single one may be given without brackets."""
    if isinstance(images, list | tuple):
        return list(images)
    return [images]  # type: ignore[list-item]  # mypy cannot tell a sequence from a str


def map_images(body: Mapping[str, Any], change: Callable[[ImageLike], str]) -> Json:
    """A copy of a prompt with each image in it replaced by ``change(image)``."""
    body = dict(body)
    if body.get("images") is not None:
        body["images"] = [change(image) for image in as_list(body["images"])]
    if body.get("messages") is not None:
        body["messages"] = [_map_message(message, change) for message in body["messages"]]
    if isinstance(body.get("body"), Mapping):  # a line of OpenAI's batch files
        body["body"] = map_images(body["body"], change)
    return body


def _map_message(message: Message | Json, change: Callable[[ImageLike], str]) -> Json:
    if isinstance(message, Message):
        message = message.model_dump(mode="json", exclude_unset=True)
    if not isinstance(message, Mapping):
        raise InvalidRequest("a message is a dict with `role` and `content`", param="messages")
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [_map_part(part, change) for part in content]}


def _map_part(part: Any, change: Callable[[ImageLike], str]) -> Any:
    if isinstance(part, Mapping) and part.get("type") == "image_url" and part.get("image_url"):
        image = part["image_url"]
        url = image["url"] if isinstance(image, Mapping) else image
        rest = image if isinstance(image, Mapping) else {}
        return {**part, "image_url": {**rest, "url": change(url)}}
    return part


def _identity(image: ImageLike) -> object:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)


def _read(image: ImageLike) -> tuple[str, bytes]:
    """A name and the bytes to upload."""
    if isinstance(image, bytes):
        return "image", image
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        try:
            return path.name, path.read_bytes()
        except FileNotFoundError:
            raise ImageNotFound(f"image {path} is not found on this machine") from None
        except OSError as error:
            raise ImageError(f"image {path} cannot be read ({error.strerror})") from error
    if isinstance(image, PilImage):
        encoded = io.BytesIO()
        image.save(encoded, format="PNG")
        return "image.png", encoded.getvalue()
    if hasattr(image, "read"):
        return "image", image.read()
    raise InvalidRequest(
        f"an image is a path, bytes, an open file, a PIL image or a reference, not "
        f"{type(image).__name__}",
        param="images",
    )
