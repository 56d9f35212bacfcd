"""`Media`: what the worker's tasks call to turn an image's name into pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visq.objects import ObjectStore
from visq.objects.images import ImageRef, image_ref
from visq.objects.web import WebReader
from visq.objects.web_ref import WebRef
from visq.objects.web_rules import WebRules
from visq.pixels import PixelBuffer
from visq.settings import Settings
from worker.media.cache import DiskCache
from worker.media.decoders import Decoders
from worker.media.fetch import EncodedImage, Fetcher, RefT, Source


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image that was fetched and decoded."""

    pixels: PixelBuffer
    """Whoever loaded it must `release` them."""
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

    def load(self, uri: str, tenant: str) -> LoadedImage:
        """Fetch and decode one image. Blocks.

        :raises InvalidRequest: it is neither an ``s3://`` name nor an ``https://`` URL.
        :raises ImageError: one of its kinds, with a message that names the image.
        :raises Unavailable: no room in shared memory, or no media process can be started.
        """
        ref = image_ref(uri, tenant, self._settings)
        image = self._web.fetch(ref) if isinstance(ref, WebRef) else self._stored.fetch(ref)
        return self._decoded(ref, image)

    def load_if_changed(self, uri: str, tenant: str, etag: str) -> LoadedImage | None:
        """Like `load`; but ``None`` if the object's ETag still is `etag`: then it was neither
        fetched nor decoded."""
        ref = image_ref(uri, tenant, self._settings)
        if isinstance(ref, WebRef):
            image = self._web.fetch_if_changed(ref, etag)
        else:
            image = self._stored.fetch_if_changed(ref, etag)
        return None if image is None else self._decoded(ref, image)

    def close(self) -> None:
        """End the media processes, and with them what they decode. Idempotent."""
        self._decoders.close()

    def _decoded(self, ref: ImageRef, image: EncodedImage) -> LoadedImage:
        pixels = self._decoders.decode(image.data, image.sha256, name=str(ref))
        return LoadedImage(pixels, image.etag)


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
