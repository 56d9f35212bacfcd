"""Requests on their way through an engine: so many at a time, their events as they come.

::

    items ──► prepare (threads: fetch, decode, shared memory) ──► engine ──► events, to one reader
              at most `limit` items between the first arrow and their outcome

The pixels of a request are released when its outcome comes, in the engine's thread, whoever still
reads: nothing stays behind when a reader goes away half way.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Protocol

from visq.errors import Unavailable, VisqError
from visq.pixels import PixelBuffer
from worker.engine.face import (
    EngineImage,
    EngineInfo,
    EngineRequest,
    Event,
    Failed,
    Handle,
    Stopped,
    TokenEvent,
)

logger = logging.getLogger(__name__)

Prepare = Callable[[], EngineRequest]
"""Makes a request; its images are the flight's from then on."""


class Engine(Protocol):
    """What is used of `worker.engine.face.Engine`."""

    @property
    def info(self) -> EngineInfo: ...

    def submit(
        self, request: EngineRequest, sink: Callable[[Event], None] | None = None
    ) -> Handle: ...

    def close(self) -> None: ...


class Flight:
    """Read its `events` once, to the end or not; `cancel` it from any thread."""

    def __init__(
        self, engine: Engine, pool: ThreadPoolExecutor, items: Iterable[Prepare], limit: int
    ) -> None:
        """
        :param limit: items that are prepared or answered at a time.
        """
        self._engine = engine
        self._pool = pool
        self._waiting = deque(enumerate(items))
        self._limit = limit
        self._events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        self._lock = threading.Lock()
        self._handles: dict[int, Handle] = {}  # submitted, without an outcome
        self._cancelled: set[int] = set()
        self._all_cancelled = False

    def events(self) -> Generator[tuple[int, Event]]:
        """Yield (index of the item, event); each item ends with one outcome. Closing the generator
        cancels what has none yet."""
        flying: dict[int, Prepare] = {}
        limit = self._limit
        try:
            while self._waiting or flying:
                while self._waiting and len(flying) < limit:
                    index, prepare = self._waiting.popleft()
                    flying[index] = prepare
                    self._start(index, prepare)
                index, event = self._events.get()
                if not isinstance(event, TokenEvent):
                    prepare = flying.pop(index)
                    if flying and isinstance(event, _NoRoom):
                        # Shared memory is full of what flies: once it has landed, there is room.
                        self._waiting.appendleft((index, prepare))
                        limit = len(flying)
                        continue
                yield index, event
        finally:
            self.cancel()

    def cancel(self, index: int | None = None) -> None:
        """End an item, or all of them, as ``Stopped("cancelled")``. Repeatable."""
        with self._lock:
            if index is None:
                self._all_cancelled = True
            else:
                self._cancelled.add(index)
            handles = [handle for n, handle in self._handles.items() if index in (None, n)]
        for handle in handles:
            handle.cancel()

    def _is_cancelled(self, index: int) -> bool:
        return self._all_cancelled or index in self._cancelled

    def _start(self, index: int, prepare: Prepare) -> None:
        try:
            self._pool.submit(self._launch, index, prepare)
        except RuntimeError:  # shut down
            self._events.put((index, Failed(Unavailable("the pipeline is closed"))))

    def _launch(self, index: int, prepare: Prepare) -> None:
        """Prepare an item and hand it to the engine; whatever goes wrong is its own failure."""
        if self._is_cancelled(index):
            self._events.put((index, Stopped("cancelled")))
            return
        try:
            request = prepare()
        except Unavailable as error:
            self._events.put((index, _NoRoom(error)))
            return
        except VisqError as error:
            self._events.put((index, Failed(error)))
            return
        except Exception:
            logger.exception("prompt %d could not be prepared", index)
            failure = VisqError("the prompt could not be prepared; the log says more")
            self._events.put((index, Failed(failure)))
            return
        self._submit(index, request)

    def _submit(self, index: int, request: EngineRequest) -> None:
        def sink(event: Event) -> None:
            if not isinstance(event, TokenEvent):
                release(request.images)
                self._handles.pop(index, None)
            self._events.put((index, event))

        with self._lock:
            if self._is_cancelled(index):
                sink(Stopped("cancelled"))
                return
            handle = self._engine.submit(request, sink)
            self._handles[index] = handle
            if handle.ended:  # perhaps before the line above
                self._handles.pop(index, None)


def release(images: Iterable[EngineImage]) -> None:
    for image in images:
        if isinstance(image, PixelBuffer):
            image.release()


class _NoRoom(Failed):
    """A request could not be prepared now; later it may."""
