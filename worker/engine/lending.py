"""Known pictures over the pipe: their pixels stay with the worker until the engine asks for them.

::

    worker                                      engine process
    KnownImage, its load            Submit  ->  KnownImage, whose load asks and waits   (Borrower)
    load(), in a thread (Lender)  <-  PixelsNeeded
                                    Pixels  ->  load() returns, or raises
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Final, TypeAlias

from visq.errors import EngineError, Unavailable, VisqError
from visq.pixels import PixelBuffer
from worker.engine.face import EngineRequest, KnownImage
from worker.engine.wire import Pixels, PixelsNeeded

logger = logging.getLogger(__name__)

LOADS: Final = 32
"""Pictures that a worker loads for its engine at a time: more than an engine asks for, so that
loads that nobody waits for any more do not keep others from beginning."""

Place: TypeAlias = tuple[int, int]
"""A picture of a request: the request's number, and its index in `EngineRequest.images`."""


class Lender:
    """In the worker: calls `KnownImage.load`, which may take its time, in threads of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(LOADS, "visq-lend")

    def lend(self, image: KnownImage, answer: Callable[[PixelBuffer | VisqError], None]) -> None:
        """Load `image` and `answer`, exactly once, with its pixels or with why there are none."""
        self._pool.submit(lambda: answer(_loaded(image)))

    def close(self) -> None:
        """Begin no further load."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _loaded(image: KnownImage) -> PixelBuffer | VisqError:
    try:
        return image.load()
    except VisqError as error:
        return error
    except Exception:
        logger.exception("a known picture cannot be loaded")
        return EngineError("a picture cannot be loaded again; the worker's log says more")


def without_loads(request: EngineRequest) -> EngineRequest:
    """`request` as it can be sent: functions stay here."""
    return _with_loads(request, lambda index: _stays_there)


class Borrower:
    """In the engine process: asks for the pixels of known pictures. Thread-safe."""

    def __init__(self, ask: Callable[[PixelsNeeded], None]) -> None:
        """:param ask: sends; the answer comes to `answered`."""
        self._ask = ask
        self._lock = threading.Lock()
        self._waiting: dict[Place, Future[PixelBuffer]] = {}

    @property
    def waits(self) -> bool:
        """Whether an answer is missing."""
        return bool(self._waiting)

    def attach(self, number: int, request: EngineRequest) -> EngineRequest:
        """`request` with known pictures that can be loaded."""
        return _with_loads(request, lambda index: partial(self._load, (number, index)))

    def answered(self, message: Pixels) -> None:
        with self._lock:
            asked = self._waiting.pop((message.number, message.index), None)
        if asked is None:
            return  # the request has ended
        if isinstance(message.pixels, VisqError):
            asked.set_exception(message.pixels)
        else:
            asked.set_result(message.pixels)

    def ended(self, number: int) -> None:
        """The request has its outcome: whoever still waits for a picture of it need not."""
        with self._lock:
            places = [place for place in self._waiting if place[0] == number]
            unwanted = [self._waiting.pop(place) for place in places]
        for asked in unwanted:
            asked.set_exception(Unavailable("the request that wanted this picture has ended"))

    def _load(self, place: Place) -> PixelBuffer:
        with self._lock:
            asked = self._waiting.get(place)
            if asked is None:
                asked = self._waiting[place] = Future()
                self._ask(PixelsNeeded(*place))
        return asked.result()


def _with_loads(
    request: EngineRequest, load: Callable[[int], Callable[[], PixelBuffer]]
) -> EngineRequest:
    if not any(isinstance(image, KnownImage) for image in request.images):
        return request
    images = [
        replace(image, load=load(index)) if isinstance(image, KnownImage) else image
        for index, image in enumerate(request.images)
    ]
    return replace(request, images=images)


def _stays_there() -> PixelBuffer:
    """What goes through the pipe in place of a load; `Borrower.attach` replaces it."""
    raise EngineError("this picture can only be loaded by the worker")
