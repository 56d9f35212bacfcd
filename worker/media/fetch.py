"""Encoded images by name: at most so many reads at a time, and one for all who ask together."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future
from dataclasses import dataclass

from visq.errors import ImageFetchFailed, ImageNotFound
from visq.objects import FetchedObject, ObjectRef, ObjectStore
from worker.media.cache import CachedObject, DiskCache


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as it lies in the store."""

    data: bytes
    sha256: str


class Fetcher:
    """Reads objects of `store` through `cache`; thread-safe.

    An object in the cache is shown only after the store said that it is unchanged. A named version
    cannot change and is not asked for again.
    """

    def __init__(
        self, store: ObjectStore, *, max_bytes: int, concurrency: int, cache: DiskCache | None
    ) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._slots = threading.BoundedSemaphore(concurrency)
        self._cache = cache
        self._lock = threading.Lock()
        self._flights: dict[ObjectRef, Future[EncodedImage]] = {}

    def fetch(self, ref: ObjectRef) -> EncodedImage:
        """Return the object; who asks while it is on its way shares that read and its outcome.

        :raises ImageError: as `ObjectStore.get` does.
        """
        with self._lock:
            flight = self._flights.get(ref)
            first = flight is None
            if flight is None:
                flight = self._flights[ref] = Future()
        if first:
            try:
                with self._slots:
                    flight.set_result(self._fetch(ref))
            except BaseException as error:
                flight.set_exception(error)  # none may wait for ever, whatever it was
                raise
            finally:
                with self._lock:
                    del self._flights[ref]
        return flight.result()

    def _fetch(self, ref: ObjectRef) -> EncodedImage:
        cached = self._cached(ref)
        if cached is not None and ref.version_id is not None:
            return EncodedImage(cached.data, cached.sha256)
        try:
            answer = self._store.get(
                ref, max_bytes=self._max_bytes, if_none_match=cached.etag if cached else None
            )
        except ImageNotFound:
            if self._cache is not None:
                self._cache.drop(ref)
            raise
        if isinstance(answer, FetchedObject):
            return self._keep(ref, answer)
        if cached is None:
            raise ImageFetchFailed(f"image {ref} could not be fetched (an answer without bytes)")
        return EncodedImage(cached.data, cached.sha256)

    def _cached(self, ref: ObjectRef) -> CachedObject | None:
        cached = self._cache.get(ref) if self._cache is not None else None
        # The limit may have become smaller since it was kept.
        return cached if cached is not None and len(cached.data) <= self._max_bytes else None

    def _keep(self, ref: ObjectRef, fetched: FetchedObject) -> EncodedImage:
        sha256 = hashlib.sha256(fetched.data).hexdigest()
        if self._cache is not None and (fetched.etag is not None or ref.version_id is not None):
            self._cache.put(ref, CachedObject(fetched.data, sha256, fetched.etag))
        return EncodedImage(fetched.data, sha256)
