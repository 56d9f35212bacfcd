"""Encoded images by name: at most so many reads at a time, and one for all who ask together.

The object store and the web have a `Fetcher` each: strangers' servers take no slot of the store.
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from visq.errors import ImageFetchFailed, ImageNotFound
from visq.objects import FetchedObject, NotModified, ObjectRef
from visq.objects.images import ImageRef
from worker.media.cache import CachedObject, DiskCache
from worker.media.slots import Slots

RefT = TypeVar("RefT", bound=ImageRef)
RefT_contra = TypeVar("RefT_contra", bound=ImageRef, contravariant=True)


class Source(Protocol[RefT_contra]):
    """An `ObjectStore`, or a `WebReader`."""

    def get(
        self, ref: RefT_contra, *, max_bytes: int, if_none_match: str | None = None
    ) -> FetchedObject | NotModified: ...


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as it lies there."""

    data: bytes
    sha256: str
    etag: str | None
    """That came with these bytes, if one did."""


class Fetcher(Generic[RefT]):
    """Reads objects of `source` through `cache`; thread-safe.

    An object in the cache is shown only after the source said that it is unchanged. A named version
    cannot change and is not asked for again.
    """

    def __init__(
        self,
        source: Source[RefT],
        *,
        max_bytes: int,
        concurrency: int,
        cache: DiskCache | None,
        patience: float = 60.0,
    ) -> None:
        """:param patience: seconds that one waits for a bucket or host that answers nobody."""
        self._source = source
        self._max_bytes = max_bytes
        self._slots = Slots(concurrency, patience)
        self._cache = cache
        self._lock = threading.Lock()
        self._flights: dict[tuple[RefT, str | None], Future[EncodedImage | None]] = {}

    def fetch(self, ref: RefT) -> EncodedImage:
        """Return the object; who asks while it is on its way shares that read and its outcome.

        :raises ImageError: as `Source.get` does.
        """
        image = self._shared(ref, None)
        assert image is not None
        return image

    def fetch_if_changed(self, ref: RefT, etag: str) -> EncodedImage | None:
        """Return the object, or ``None`` if its ETag still is `etag`: then no bytes were read.

        :raises ImageError: as `Source.get` does.
        """
        return self._shared(ref, etag)

    def _shared(self, ref: RefT, etag: str | None) -> EncodedImage | None:
        with self._lock:
            flight = self._flights.get((ref, etag))
            first = flight is None
            if flight is None:
                flight = self._flights[ref, etag] = Future()
        if first:
            try:
                with self._slots.taken(ref):
                    found = self._fetch(ref) if etag is None else self._fetch_changed(ref, etag)
                    flight.set_result(found)
            except BaseException as error:
                flight.set_exception(error)  # none may wait for ever, whatever it was
                raise
            finally:
                with self._lock:
                    del self._flights[ref, etag]
        return flight.result()

    def _fetch_changed(self, ref: RefT, etag: str) -> EncodedImage | None:
        answer = self._ask(ref, etag)
        return self._keep(ref, answer) if isinstance(answer, FetchedObject) else None

    def _fetch(self, ref: RefT) -> EncodedImage:
        cached = self._cached(ref)
        if cached is not None and is_fixed(ref):
            return EncodedImage(cached.data, cached.sha256, cached.etag)
        answer = self._ask(ref, cached.etag if cached else None)
        if isinstance(answer, FetchedObject):
            return self._keep(ref, answer)
        if cached is None:
            raise ImageFetchFailed(f"image {ref} could not be fetched (an answer without bytes)")
        return EncodedImage(cached.data, cached.sha256, cached.etag)

    def _ask(self, ref: RefT, etag: str | None) -> FetchedObject | NotModified:
        try:
            return self._source.get(ref, max_bytes=self._max_bytes, if_none_match=etag)
        except ImageNotFound:
            if self._cache is not None:
                self._cache.drop(ref)
            raise

    def _cached(self, ref: RefT) -> CachedObject | None:
        cached = self._cache.get(ref) if self._cache is not None else None
        # The limit may have become smaller since it was kept.
        return cached if cached is not None and len(cached.data) <= self._max_bytes else None

    def _keep(self, ref: RefT, fetched: FetchedObject) -> EncodedImage:
        sha256 = hashlib.sha256(fetched.data).hexdigest()
        if self._cache is not None and (fetched.etag is not None or is_fixed(ref)):
            self._cache.put(ref, CachedObject(fetched.data, sha256, fetched.etag))
        return EncodedImage(fetched.data, sha256, fetched.etag)


def is_fixed(ref: ImageRef) -> bool:
    """Whether what it names can never change."""
    return isinstance(ref, ObjectRef) and ref.version_id is not None
