"""The pictures of one run: those of its turn are loaded; those of the history, if they are known,
only compared with the store, and loaded when the model must read them again.

The store is asked about every picture of every run, so a picture that changed after it was shown
is always found (``image_changed``): `docs/decisions/007-known-pictures.md`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor as Pool
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

from models.outcomes import ShownPicture, Work
from visq.errors import ImageChanged, ImageFetchFailed, Unavailable
from visq.objects.web_ref import public_name
from visq.pixels import PixelBuffer
from visq.types import ImagePart, Message, TextPart
from worker.engine.face import EngineImage, KnownImage
from worker.media import LoadedImage, Media


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a run shows."""

    turn: list[Message]
    """The turn's messages, with the hashes of their images."""
    images: list[EngineImage]
    """Of the history and then of the turn, one for each image part."""
    shown: dict[str, ShownPicture]
    """By URL: what the next turn must know of the turn's pictures."""


@contextmanager
def pictures_of(
    work: Work, media: Media, pool: Pool, is_stopped: Callable[[], bool]
) -> Iterator[Pictures | None]:
    """Load what must be loaded; ``None`` if the run was stopped on the way.

    An image that comes several times is fetched once. All pixels live as long as the block.

    :param pool: where the store is asked about all but one of them.
    """
    turn = work.prompt.as_messages()
    asked = [part.image_url.url for part in _images(turn)]
    known = {} if work.accept_changed_images else _known(work, without=asked)
    parts = _images([*(remembered.message for remembered in work.history), *turn])
    urls = list(dict.fromkeys(part.image_url.url for part in parts))

    failed = threading.Event()

    def load(url: str) -> LoadedImage | None:
        """``None``: it is known and unchanged, or nobody wants it any more."""
        if is_stopped() or failed.is_set():
            return None
        try:
            if url in known:
                return media.load_if_changed(url, work.tenant, known[url].picture.etag)
            return media.load(url, work.tenant)
        except ImageFetchFailed:
            failed.set()  # a store that hangs is not waited for once more for each picture
            raise

    with _Buffers() as buffers:
        fetches = {url: pool.submit(load, url) for url in urls[1:]}
        # One of them in this thread, which would only wait. After it, those that the pool has not
        # begun: its threads may all be with a bucket that hangs.
        fetches |= {url: _loaded(load, url) for url in urls[:1]}
        fetches |= {url: _loaded(load, url) for url in urls[1:] if fetches[url].cancel()}
        wait(fetches.values())
        for fetch in fetches.values():
            if fetch.exception() is None and (loaded := fetch.result()) is not None:
                buffers.add(loaded.pixels)
        found = {url: fetches[url].result() for url in urls}
        if is_stopped():
            yield None
            return
        images: dict[str, EngineImage] = {}
        for url, loaded in found.items():
            if loaded is not None:
                images[url] = loaded.pixels
            else:
                again = _LoadAgain(url, known[url].sha256, work.tenant, media, buffers)
                images[url] = known[url].as_image(again)
        if not work.accept_changed_images:
            for part in parts:
                _check_unchanged(part.image_url.url, part.sha256, images[part.image_url.url])
        yield Pictures(
            turn=[_with_hashes(message, images) for message in turn],
            images=[images[part.image_url.url] for part in parts],
            shown={url: seen for url in asked if (seen := _as_shown(found[url])) is not None},
        )


def _loaded(load: Callable[[str], LoadedImage | None], url: str) -> Future[LoadedImage | None]:
    """As a pool does it."""
    answer: Future[LoadedImage | None] = Future()
    try:
        answer.set_result(load(url))
    except BaseException as error:  # noqa: BLE001 (raised by whoever asks for the result)
        answer.set_exception(error)
    return answer


@dataclass(frozen=True, slots=True)
class _Known:
    """A picture of the history."""

    sha256: str
    picture: ShownPicture

    def as_image(self, load: Callable[[], PixelBuffer]) -> KnownImage:
        return KnownImage(self.sha256, self.picture.height, self.picture.width, load)


class _LoadAgain:
    """Loads an image of the history when the engine asks for it: once, for all who ask."""

    def __init__(self, url: str, sha256: str, tenant: str, media: Media, buffers: _Buffers) -> None:
        self._url = url
        self._sha256 = sha256
        self._tenant = tenant
        self._media = media
        self._buffers = buffers
        self._lock = threading.Lock()
        self._pixels: PixelBuffer | None = None

    def __call__(self) -> PixelBuffer:
        with self._lock:
            if self._pixels is None:
                pixels = self._media.load(self._url, self._tenant).pixels
                self._buffers.add(pixels)
                # It may have changed since the store was asked.
                _check_unchanged(self._url, self._sha256, pixels)
                self._pixels = pixels
            return self._pixels


class _Buffers:
    """Pixels that are released when the run ends, or at once if they come after it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[PixelBuffer] | None = []

    def add(self, pixels: PixelBuffer) -> None:
        """:raises Unavailable: the run has ended."""
        with self._lock:
            if self._held is not None:
                self._held.append(pixels)
                return
        pixels.release()
        raise Unavailable("the run that wanted this image has ended")

    def __enter__(self) -> _Buffers:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            held, self._held = self._held or [], None
        for pixels in held:
            pixels.release()


def _known(work: Work, *, without: list[str]) -> dict[str, _Known]:
    """By URL: the pictures of the history of which all is known, and the same wherever they stand.

    :param without: URLs that are loaded in any case.
    """
    found: dict[str, set[_Known | None]] = {}
    for remembered in work.history:
        parts = _images([remembered.message])
        for part, picture in zip(parts, remembered.pictures, strict=False):
            known = None if part.sha256 is None or picture is None else _Known(part.sha256, picture)
            found.setdefault(part.image_url.url, set()).add(known)
    return {
        url: known
        for url, several in found.items()
        if url not in without and len(several) == 1 and (known := next(iter(several))) is not None
    }


def _as_shown(loaded: LoadedImage | None) -> ShownPicture | None:
    if loaded is None or loaded.etag is None:
        return None
    return ShownPicture(loaded.pixels.height, loaded.pixels.width, loaded.etag)


def _check_unchanged(url: str, sha256: str | None, image: EngineImage) -> None:
    """:raises ImageChanged: it is not the content that was shown, or announced, as `sha256`."""
    if sha256 not in (None, image.sha256):
        raise ImageChanged(
            f"{public_name(url)} has other content than when it was shown; submit with "
            '`on_image_change: "accept"` to go on with the new content',
            param=public_name(url)[:256],
        )


def _with_hashes(message: Message, images: dict[str, EngineImage]) -> Message:
    content: list[TextPart | ImagePart] = [
        part.model_copy(update={"sha256": images[part.image_url.url].sha256})
        if isinstance(part, ImagePart)
        else part
        for part in message.parts()
    ]
    return Message(role=message.role, content=content)


def _images(messages: list[Message]) -> list[ImagePart]:
    return [part for message in messages for part in message.parts() if isinstance(part, ImagePart)]
