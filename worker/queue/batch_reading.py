"""The input of a batch becomes items: lines of a file, or images under a prefix."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final

from models import images, reading
from models.batch_holds import Place
from models.batch_items import NewItem
from models.database import Database
from models.tables import Batch
from visq.batch_files.items import ItemError, item_of
from visq.batch_files.lines import Line
from visq.batch_files.reading import lines_of
from visq.errors import BatchInputError, ImageNotFound, VisqError
from visq.objects import ObjectRef, ObjectStore, parse_uri
from visq.references import (
    Stored,
    at_place,
    check_names,
    decode_data_url,
    image_type,
    is_data,
    is_id,
    references,
    rewritten,
    upload_ref,
)
from visq.settings import Settings
from visq.types import BatchItem

IMAGE_ENDINGS: Final = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")

CHUNK: Final = 250
"""Items that are added in one transaction."""
CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Of their lines."""
CHUNK_SECONDS: Final = 5.0
"""In which they are read, if that takes long: what was read is kept, and others have their turn."""


@dataclass(frozen=True)
class Chunk:
    """Items that follow each other, and where reading goes on after them."""

    items: list[NewItem]
    place: Place
    is_last: bool = False


@dataclass(frozen=True)
class _Found:
    item: NewItem | None
    """``None``: what lies there is none, and is passed over."""
    place: Place
    """After it."""
    size: int
    """Bytes of it."""


class BatchReader:
    """Reads the inputs of batches of one tenant after the other."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        store: ObjectStore,
        served: Callable[[], Collection[str] | None],
    ) -> None:
        """:param served: the models of the live workers; ``None``: nobody knows."""
        self._settings = settings
        self._database = database
        self._store = store
        self._served = served

    def chunks(
        self,
        batch: Batch,
        tenant: str,
        place: Place,
        alive: Callable[[], None] = lambda: None,
    ) -> Iterator[Chunk]:
        """The items of a batch after `place`.

        :param alive: called while there is no chunk for long; what it raises is passed on.
        :raises BatchInputError: the input is no file of items.
        :raises NotFound, ObjectForbidden, ObjectChanged: it cannot be read.
        :raises Unavailable: the store does not answer.
        """
        items: list[NewItem] = []
        size, until = 0, time.monotonic() + CHUNK_SECONDS
        with closing(self._found(batch, place, alive)) as numbered:
            for found in numbered:
                if found.item is not None:
                    items.append(self._resolved(found.item, batch, tenant, alive))
                place = found.place
                size += found.size
                if len(items) == CHUNK or size > CHUNK_BYTES or time.monotonic() > until:
                    yield Chunk(items, place)
                    items, size, until = [], 0, time.monotonic() + CHUNK_SECONDS
        if not items and place.position == 0:
            raise BatchInputError(
                f"there is nothing in {batch.input_uri}: no line, or (under a prefix) no image "
                f"({', '.join(IMAGE_ENDINGS)})"
            )
        yield Chunk(items, place, is_last=True)

    def items(self, batch: Batch) -> Iterator[NewItem]:
        """All items as they are written: nothing is stored, and no image is looked at. With the
        errors of `chunks`."""
        with closing(self._found(batch, Place(), lambda: None)) as numbered:
            for found in numbered:
                if found.item is not None:
                    yield found.item

    def _found(self, batch: Batch, place: Place, alive: Callable[[], None]) -> Generator[_Found]:
        assert batch.input_uri is not None
        is_prefix = batch.input_uri.endswith("/")
        numbered = self._images(batch, place) if is_prefix else self._lines(batch, place, alive)
        most = self._settings.max_batch_items
        with closing(numbered):
            for found in numbered:
                if found.place.position > most:  # packed, a small file may have any number
                    raise BatchInputError(
                        f"it has more than {most} lines or images (VISQ_MAX_BATCH_ITEMS): split it"
                    )
                yield found

    def _lines(self, batch: Batch, place: Place, alive: Callable[[], None]) -> Generator[_Found]:
        uri = batch.input_uri or ""
        models = self._served()
        with self._store.open(parse_uri(uri), if_match=batch.input_etag) as file:
            found = lines_of(
                file,
                uri,
                max_bytes=self._settings.max_line_bytes,
                number=place.position,
                offset=place.offset,
                alive=alive,
            )
            for line in found:
                # What is passed over between two lines has taken its time, too.
                size = max(line.offset - place.offset, len(line.data or b""))
                place = Place(line.number, line.offset)
                yield _Found(_item(line, models), place, size)

    def _images(self, batch: Batch, place: Place) -> Generator[_Found]:
        bucket, _, prefix = (batch.input_uri or "").removeprefix("s3://").partition("/")
        position = place.position
        for found in self._store.list(bucket, prefix, after=place.after):
            if not found.key.lower().endswith(IMAGE_ENDINGS):
                yield _Found(None, Place(position, after=found.key), 0)
                continue
            position += 1
            name = found.key.removeprefix(prefix)
            if len(name) > 128:  # the beginning would not tell apart
                name = f"{name[:95]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
            try:
                uri = ObjectRef(bucket, found.key).uri
                item = BatchItem(custom_id=name, prompt=str(batch.options["prompt"]), images=[uri])
                new = NewItem(position - 1, item)
            except VisqError as error:
                new = NewItem(position - 1, error=error, custom_id=name)
            yield _Found(new, Place(position, after=found.key), len(found.key))

    def _resolved(
        self, new: NewItem, batch: Batch, tenant: str, alive: Callable[[], None]
    ) -> NewItem:
        """The item with the references that a worker takes."""
        if new.item is None:
            return new
        try:
            return replace(
                new, item=self._with_references(new.item, batch.tenant_id, tenant, alive)
            )
        except VisqError as error:
            if error.retryable:
                raise
            named = type(error)(f"line {new.position + 1}: {error.message}", param=error.param)
            return NewItem(new.position, error=named, custom_id=new.item.custom_id)

    def _with_references(
        self, item: BatchItem, tenant_id: str, tenant: str, alive: Callable[[], None]
    ) -> BatchItem:
        places = {url: place for place, url in references(item)}
        if not places:
            return item
        named = {url: p for url, p in places.items() if not (is_data(url) or is_id(url))}
        stored = check_names(named, tenant, self._settings)
        for url, place in places.items():
            alive()  # an item may have hundreds of images, and the store may be slow
            try:
                if is_id(url):
                    stored[url] = self._uploaded(url, tenant_id)
                elif is_data(url):
                    stored[url] = self._upload(url, tenant_id, tenant)
            except VisqError as error:
                raise at_place(place, error) from None
        return rewritten(item, stored)

    def _uploaded(self, image_id: str, tenant_id: str) -> Stored:
        image = self._database.read(reading.image_by_id, image_id)
        if image is None or image.tenant_id != tenant_id:
            raise ImageNotFound(f"there is no upload {image_id}")
        return Stored(image.uri, image.sha256)

    def _upload(self, url: str, tenant_id: str, tenant: str) -> Stored:
        data = decode_data_url(url, self._settings.max_upload_bytes)
        sha256 = hashlib.sha256(data).hexdigest()
        ref = upload_ref(tenant, sha256, self._settings)
        self._store.put(ref, data, image_type(data))
        self._database.run(images.add, tenant_id, uri=ref.uri, sha256=sha256, size=len(data))
        return Stored(ref.uri, sha256)


def _item(line: Line, models: Collection[str] | None) -> NewItem:
    try:
        return NewItem(line.number - 1, item_of(line, models=models))
    except ItemError as wrong:
        return NewItem(line.number - 1, error=wrong.error, custom_id=wrong.custom_id)
