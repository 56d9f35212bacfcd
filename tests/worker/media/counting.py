"""A store that counts what is read of it."""

from __future__ import annotations

import threading

from visq.objects import FetchedObject, NotModified, ObjectRef, ObjectStore


class CountingStore:
    """A real store behind a door: counts what it answers, and can hold readers back."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.remote = store.remote
        self.full = self.unchanged = self.inside = self.most_inside = 0
        self.open = threading.Event()
        self.open.set()
        self._lock = threading.Lock()

    def get(
        self, ref: ObjectRef, *, max_bytes: int, if_none_match: str | None = None
    ) -> FetchedObject | NotModified:
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        try:
            self.open.wait(60)
            answer = self._store.get(ref, max_bytes=max_bytes, if_none_match=if_none_match)
        finally:
            with self._lock:
                self.inside -= 1
        with self._lock:
            self.full += isinstance(answer, FetchedObject)
            self.unchanged += isinstance(answer, NotModified)
        return answer

    def put(self, ref: ObjectRef, data: bytes, content_type: str) -> None:
        self._store.put(ref, data, content_type)

    def ping(self) -> None:
        self._store.ping()

    def close(self) -> None:
        self._store.close()
