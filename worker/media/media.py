"""`Media`: what the worker's tasks call to turn an image's name into pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visq.objects import ObjectRef, ObjectStore, check_access, parse_uri
from visq.pixels import PixelBuffer
from visq.settings import Settings
from worker.media.cache import DiskCache
from worker.media.decoders import Decoders
from worker.media.fetch import EncodedImage, Fetcher


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
        self._fetcher = Fetcher(
            store,
            max_bytes=settings.max_image_bytes,
            concurrency=settings.fetch_concurrency,
            cache=_cache(settings, store),
            patience=settings.fetch_total_seconds,
        )
        self._decoders = Decoders(
            settings.decode_processes,
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            timeout_seconds=settings.decode_timeout_seconds,
        )

    def load(self, ref_or_uri: ObjectRef | str, tenant: str) -> LoadedImage:
        """Fetch and decode one image. Blocks.

        :raises InvalidRequest: it is not an ``s3://`` name.
        :raises ImageError: one of its kinds, with a message that names the image.
        :raises Unavailable: no room in shared memory, or no media process can be started.
        """
        ref = self._ref(ref_or_uri, tenant)
        return self._decoded(ref, self._fetcher.fetch(ref))

    def load_if_changed(
        self, ref_or_uri: ObjectRef | str, tenant: str, etag: str
    ) -> LoadedImage | None:
        """Like `load`; but ``None`` if the object's ETag still is `etag`: then it was neither
        fetched nor decoded."""
        ref = self._ref(ref_or_uri, tenant)
        image = self._fetcher.fetch_if_changed(ref, etag)
        return None if image is None else self._decoded(ref, image)

    def close(self) -> None:
        """End the media processes, and with them what they decode. Idempotent."""
        self._decoders.close()

    def _ref(self, ref_or_uri: ObjectRef | str, tenant: str) -> ObjectRef:
        ref = parse_uri(ref_or_uri) if isinstance(ref_or_uri, str) else ref_or_uri
        check_access(ref, tenant, self._settings)
        return ref

    def _decoded(self, ref: ObjectRef, image: EncodedImage) -> LoadedImage:
        pixels = self._decoders.decode(image.data, image.sha256, name=ref.uri)
        return LoadedImage(pixels, image.etag)


def _cache(settings: Settings, store: ObjectStore) -> DiskCache | None:
    """The image cache, if there is one: copies of local files are worth nothing."""
    if not store.remote or settings.media_cache_bytes == 0:
        return None
    folder: Path = settings.media_cache or settings.data / "media-cache"
    return DiskCache(folder.absolute(), settings.media_cache_bytes)
