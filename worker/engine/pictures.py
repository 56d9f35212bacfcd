"""The pictures of requests on their way to the model: each is prepared once, while it is needed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np

from visq.pixels import PixelBuffer
from worker.engine.face import EngineImage, KnownImage
from worker.engine.families.base import Family, PreparedImage
from worker.engine.preparing import Preparers
from worker.engine.room import Room

SIZES_TOKENS: Final = 1 << 20
"""Placeholders of pictures of known sizes that are remembered, some 40 bytes each."""


class Pictures:
    """Prepares pictures for the intake's threads, of which one has its turn at a time."""

    def __init__(
        self,
        family: Family,
        preparers: Preparers | None,
        room: Room,
        turn: threading.Lock,
        is_cached: Callable[[bytes], bool],
    ) -> None:
        """
        :param turn: held by whoever calls `prepared`; others have it while that waits.
        :param is_cached: whether the features of a picture are known.
        """
        self._family = family
        self._preparers = preparers
        self._room = room
        self._turn = turn
        self._is_cached = is_cached
        self._sizes: dict[tuple[int, int], _Size] = {}
        self._sizes_tokens = 0
        self._prepared: weakref.WeakValueDictionary[bytes, PreparedImage] = (
            weakref.WeakValueDictionary()
        )
        """Pictures that wait for their encoding, for others who show the same ones."""
        self._begun: dict[bytes, threading.Event] = {}
        """Pictures that are being prepared; set when that has ended."""

    def nbytes(self, image: EngineImage) -> int:
        """What it will take when it is prepared, as far as one can tell; any thread.

        (Of a size that nobody has shown, a picture is taken to become no larger than it is.)
        """
        if isinstance(image, KnownImage):
            return 0
        size = self._sizes.get((image.height, image.width))
        return 3 * image.height * image.width if size is None else size.nbytes

    def prepared(self, key: bytes, image: EngineImage) -> PreparedImage:
        """The picture's tokens; and its pixels, if they are at hand and may be needed.

        :param key: names its content.
        """
        size = (image.height, image.width)
        if isinstance(image, KnownImage):
            if (known := self._sizes.get(size)) is None:
                # Any picture of this size has these tokens.
                blank = np.zeros((*size, 3), dtype=np.uint8)
                known = self._remember(size, self._family.prepare_image(blank))
            return known.image
        while True:
            if (known := self._sizes.get(size)) is not None and self._is_cached(key):
                return known.image
            if (prepared := self._prepared.get(key)) is not None:
                return prepared
            if (begun := self._begun.get(key)) is None:
                return self._prepare_first(key, image)
            with self._others_turn():
                begun.wait()

    def prepare(self, image: PixelBuffer) -> PreparedImage:
        """Prepare a picture, whatever is known of it; any thread, which has not the turn."""
        prepared = None if self._preparers is None else self._preparers.prepare(image)
        if prepared is None:
            prepared = self._family.prepare_image(image.array())
        self._room.hold(prepared)
        return prepared

    def _prepare_first(self, key: bytes, image: PixelBuffer) -> PreparedImage:
        """Prepare a picture that nobody else is preparing."""
        begun = self._begun[key] = threading.Event()
        try:
            prepared = None
            if self._preparers is not None:
                with self._others_turn():
                    prepared = self._preparers.prepare(image)
            if prepared is None:
                prepared = self._family.prepare_image(image.array())
            self._remember((image.height, image.width), prepared)
            self._room.hold(prepared)
            self._prepared[key] = prepared
            return prepared
        finally:
            del self._begun[key]
            begun.set()

    @contextmanager
    def _others_turn(self) -> Iterator[None]:
        """Let other threads work while this one waits."""
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()

    def _remember(self, size: tuple[int, int], prepared: PreparedImage) -> _Size:
        known = _Size(prepared.without_pixels(), prepared.nbytes)
        if size not in self._sizes:
            if self._sizes_tokens > SIZES_TOKENS:
                self._sizes.clear()
                self._sizes_tokens = 0
            self._sizes[size] = known
            self._sizes_tokens += len(prepared.token_ids)
        return known


@dataclass(frozen=True, slots=True)
class _Size:
    """What is known of all pictures of a size."""

    image: PreparedImage
    """Without pixels."""
    nbytes: int
    """With them."""
