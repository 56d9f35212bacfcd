"""What ``visq batch run`` is given, as the input of a batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from visq.batch_files.lines import Line
from visq.batch_files.reading import lines_of
from visq.errors import BatchInputError, InvalidRequest

FILES: Final = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")
MAX_LINE_BYTES: Final = 64 * 1024 * 1024
"""Of a local file, whose images may be in it; the server has its own limit."""


def input_of(
    sources: list[str], prompt: str | None, images: str | None
) -> tuple[Iterator[dict[str, Any]] | None, dict[str, Any]]:
    """Items, or the options that name an input in the object store.

    :param images: of a file's items: where image names that are no references are found. Without
        sources: the images.
    :raises InvalidRequest: it is no input, or a prompt is missing.
    """
    if not sources and images is not None:
        sources, images = [images], None
    if not sources:
        raise InvalidRequest("give a file of items, or images", param="sources")
    if len(sources) == 1:
        [source] = sources
        is_file = source.endswith(FILES)
        if source.startswith("s3://") and (is_file or source.endswith("/")):
            if images is not None:
                raise InvalidRequest(
                    "--images goes with a local file: the server reads this one as it is",
                    param="images",
                )
            return None, {"input_uri": source} | ({"prompt": prompt} if prompt else {})
        if is_file:
            return _file_items(Path(source), prompt, images), {}
    if images is not None:
        raise InvalidRequest("--images goes with a file of items", param="images")
    if prompt is None:
        raise InvalidRequest("say what to ask of each image: --prompt", param="prompt")
    return _image_items(sources, prompt), {}


def _image_items(sources: list[str], prompt: str) -> Iterator[dict[str, Any]]:
    names = [source[-128:] for source in sources]
    numbered = len(set(names)) < len(names)
    for number, (name, source) in enumerate(zip(names, sources, strict=True)):
        name = str(number) if numbered else name
        yield {"custom_id": name, "prompt": prompt, "images": [source]}


def _file_items(path: Path, prompt: str | None, images: str | None) -> Iterator[dict[str, Any]]:
    """A line at a time.

    :raises InvalidRequest: names the line that is no item.
    """
    try:
        with path.open("rb") as file:
            for line in lines_of(file, path.name, max_bytes=MAX_LINE_BYTES):
                yield _item(line, f"{path}, line {line.number}", prompt, images)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror or error})") from error
    except BatchInputError as error:
        raise InvalidRequest(f"{path}: {error.message}") from None


def _item(line: Line, place: str, prompt: str | None, images: str | None) -> dict[str, Any]:
    if line.data is None or line.fault is not None:
        raise InvalidRequest(f"{place}: {line.fault or 'it is too long'}")
    try:
        item = json.loads(line.data)
    except ValueError as error:
        raise InvalidRequest(f"{place} is not JSON: {error}") from None
    if not isinstance(item, dict):
        raise InvalidRequest(f"{place} is not an object")
    if prompt is not None and not {"messages", "body"} & item.keys():
        item.setdefault("prompt", prompt)
    return item if images is None else _located(item, images)


def _located(item: dict[str, Any], folder: str) -> dict[str, Any]:
    """The item with its image names in `folder`."""
    from visq.client.images import is_reference, map_images

    def located(image: Any) -> Any:
        if not isinstance(image, str) or is_reference(image):
            return image
        return f"{folder.rstrip('/')}/{image}"

    return map_images(item, located)
