"""`Media`: what the worker's tasks call to turn an image's name into pixels."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from visq.errors import ImageError
from visq.objects import ObjectStore
from visq.objects.images import ImageRef, image_ref
from visq.objects.web import WebReader
from visq.objects.web_ref import WebRef
from visq.objects.web_rules import WebRules
from visq.pixels import SHARED_MEMORY, PixelBuffer
from visq.settings import Settings
from worker.media.cache import DiskCache
from worker.media.contents import Content, Contents
from worker.media.decoders import Decoders
from worker.media.fetch import EncodedImage, Fetcher, RefT, Source, is_fixed
from worker.media.pixel_cache import PixelCache

KEPT_SHARE: Final = 8
"""At most one part in so many of shared memory holds pixels that nobody uses."""


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image that was fetched and decoded."""

    pixels: PixelBuffer
    """Whoever loaded it must `release` them, and harms nobody else who has the same ones."""
    etag: str | None
    """Of the object, with these bytes; for `Media.load_if_changed`."""


class Media:
    """Loads images for many threads at a time. Close it to end its media processes.

    `store` stays the caller's.
    """

    def __init__(self, settings: Settings, store: ObjectStore) -> None:
        self._settings = settings
        cache = _cache(settings)
        # Copies of local files are worth nothing.
        self._stored = _fetcher(settings, store, cache if store.remote else None)
        web = WebReader(
            WebRules.from_settings(settings),
            silence_seconds=settings.fetch_timeout_seconds,
            total_seconds=settings.fetch_total_seconds,
        )
        self._web = _fetcher(settings, web, cache)
        self._decoders = Decoders(
            settings.decode_processes,
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            timeout_seconds=settings.decode_timeout_seconds,
        )
        self._pixels = PixelCache(self._decoders.decode, _kept_bytes(settings))
        self._contents = Contents()

    def load(self, uri: str, tenant: str) -> LoadedImage:
        """Fetch and decode one image, as far as that is not done. Blocks.

        :raises InvalidRequest: it is neither an ``s3://`` name nor an ``https://`` URL.
        :raises ImageError: one of its kinds, with a message that names the image.
        :raises Unavailable: no room in shared memory, or no media process can be started.
        """
        ref = image_ref(uri, tenant, self._settings)
        content = self._contents.get(ref)
        if content is not None and self._pixels.knows(content.sha256):
            changed = None if is_fixed(ref) else self._fetch_if_changed(ref, content.etag)
            if changed is not None:
                return self._decoded(ref, changed)
            if (pixels := self._pixels.held(content.sha256)) is not None:
                return LoadedImage(pixels, content.etag)
        return self._decoded(ref, self._fetch(ref))

    def load_if_changed(self, uri: str, tenant: str, etag: str) -> LoadedImage | None:
        """Like `load`; but ``None`` if the object's ETag still is `etag`: then it was neither
        fetched nor decoded."""
        ref = image_ref(uri, tenant, self._settings)
        image = self._fetch_if_changed(ref, etag)
        return None if image is None else self._decoded(ref, image)

    def close(self) -> None:
        """End the media processes, and with them what they decode; free pixels that nobody uses.
        Idempotent."""
        self._decoders.close()
        self._pixels.close()

    def _fetch(self, ref: ImageRef) -> EncodedImage:
        with self._contents.asked(ref):
            return self._web.fetch(ref) if isinstance(ref, WebRef) else self._stored.fetch(ref)

    def _fetch_if_changed(self, ref: ImageRef, etag: str) -> EncodedImage | None:
        with self._contents.asked(ref):
            if isinstance(ref, WebRef):
                return self._web.fetch_if_changed(ref, etag)
            return self._stored.fetch_if_changed(ref, etag)

    def _decoded(self, ref: ImageRef, image: EncodedImage) -> LoadedImage:
        if image.etag is not None:
            self._contents.put(ref, Content(image.etag, image.sha256))
        try:
            return LoadedImage(self._pixels.get(image.data, image.sha256), image.etag)
        except ImageError as error:
            # Shared by all who asked for this content: each is told its own name of it.
            raise type(error)(f"image {ref} {error.message}") from None


def _fetcher(settings: Settings, source: Source[RefT], cache: DiskCache | None) -> Fetcher[RefT]:
    return Fetcher(
        source,
        max_bytes=settings.max_image_bytes,
        concurrency=settings.fetch_concurrency,
        cache=cache,
        patience=settings.fetch_total_seconds,
    )


def _cache(settings: Settings) -> DiskCache | None:
    """The image cache, if there is to be one."""
    if settings.media_cache_bytes == 0:
        return None
    folder: Path = settings.media_cache or settings.data / "media-cache"
    return DiskCache(folder.absolute(), settings.media_cache_bytes)


def _kept_bytes(settings: Settings) -> int:
    """Pixels that are kept unused."""
    if not SHARED_MEMORY.is_dir():
        return settings.pixel_cache_bytes
    return min(settings.pixel_cache_bytes, shutil.disk_usage(SHARED_MEMORY).total // KEPT_SHARE)
