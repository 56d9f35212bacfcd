"""What names showed when they were last read, so that unchanged content is known without a look."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from visq.errors import ImageNotFound
from visq.objects.images import ImageRef

MOST: Final = 4096
"""Names that are remembered."""


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a name."""

    etag: str
    """Under which the store, or the server, knows it."""
    sha256: str


class Contents:
    """The content of the names that were used last; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[ImageRef, Content] = OrderedDict()

    def get(self, ref: ImageRef) -> Content | None:
        return self._known.get(ref)

    def put(self, ref: ImageRef, content: Content) -> None:
        with self._lock:
            self._known[ref] = content
            self._known.move_to_end(ref)
            if len(self._known) > MOST:
                self._known.popitem(last=False)

    @contextmanager
    def asked(self, ref: ImageRef) -> Iterator[None]:
        """While `ref` is read: if it is not found, it is forgotten. What has its name later is
        another object, whatever its ETag."""
        try:
            yield
        except ImageNotFound:
            with self._lock:
                self._known.pop(ref, None)
            raise
