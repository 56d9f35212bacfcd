"""The pictures of a run, with a real object store that counts and real media processes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from models.outcomes import Remembered, ShownPicture, Work
from tests.worker.playing import claimed_work
from visq.errors import ImageChanged, ImageForbidden, ImageNotFound, Unavailable
from visq.objects import FetchedObject, NotModified, ObjectRef
from visq.objects.folder import FolderStore
from visq.pixels import NAME_PREFIX, PixelBuffer
from visq.settings import Settings
from visq.types import ImagePart
from worker.engine.face import KnownImage
from worker.media import Media
from worker.pictures import Pictures, pictures_of

URL = "s3://photos/a.png"
OTHER = "s3://photos/b.png"


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60), colour).save(buffer, "PNG")
    return buffer.getvalue()


class CountingStore(FolderStore):
    """A folder store that writes down what it was asked for, and whether bytes were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.read: list[str] = []
        self.unchanged: list[str] = []

    def get(
        self, ref: ObjectRef, *, max_bytes: int, if_none_match: str | None = None
    ) -> FetchedObject | NotModified:
        answer = super().get(ref, max_bytes=max_bytes, if_none_match=if_none_match)
        (self.read if isinstance(answer, FetchedObject) else self.unchanged).append(ref.uri)
        return answer


@dataclass
class World:
    store: CountingStore
    media: Media
    pool: ThreadPoolExecutor
    stopped: bool = False
    stack: ExitStack = field(default_factory=ExitStack)

    def put(self, url: str, data: bytes) -> None:
        bucket, key = url.removeprefix("s3://").split("/")
        self.store.put(ObjectRef(bucket, key), data, "image/png")

    def open(self, work: Work) -> Pictures:
        """The pictures of a run that goes on until the end of the test, or `close`."""
        found = self.stack.enter_context(
            pictures_of(work, self.media, self.pool, lambda: self.stopped)
        )
        assert found is not None
        return found

    def shown(self, *urls: str) -> Work:
        """The second turn of a session whose first one showed `urls`; nothing is counted yet."""
        with pictures_of(claimed_work(*urls), self.media, self.pool, lambda: False) as pictures:
            assert pictures is not None
        [message] = pictures.turn
        known = [pictures.shown.get(url) for url in urls]
        self.store.read.clear()
        return claimed_work(history=[Remembered(message, pictures=known)])

    def close(self) -> None:
        self.stack.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CountingStore:
    return CountingStore(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def media(store: CountingStore) -> Iterator[Media]:
    media = Media(Settings(decode_processes=1, pixel_cache_bytes=0), store)
    yield media
    media.close()


@pytest.fixture
def world(store: CountingStore, media: Media) -> Iterator[World]:
    store.read, store.unchanged = [], []
    with ThreadPoolExecutor(4) as pool:
        world = World(store, media, pool)
        world.put(URL, png("red"))
        world.put(OTHER, png("blue"))
        yield world
        world.close()
    assert buffers() == []


def buffers() -> list[str]:
    """The pixels that this process has in shared memory."""
    return [name for name in os.listdir("/dev/shm") if f"/{name}".startswith(OURS)]


OURS = f"{NAME_PREFIX}{os.getpid()}-"


def only(pictures: Pictures) -> KnownImage:
    [image] = pictures.images
    assert isinstance(image, KnownImage)
    return image


def test_a_new_picture_is_loaded_and_what_the_next_turn_needs_is_kept(world: World) -> None:
    pictures = world.open(claimed_work(URL, URL, OTHER))
    assert world.store.read.count(URL) == 1
    assert all(isinstance(image, PixelBuffer) for image in pictures.images)
    assert len(pictures.images) == 3
    assert set(pictures.shown) == {URL, OTHER}
    seen = pictures.shown[URL]
    assert (seen.height, seen.width) == (60, 90)
    [message] = pictures.turn
    hashes = [part.sha256 for part in message.parts() if isinstance(part, ImagePart)]
    assert hashes == [sha256(png(colour)).hexdigest() for colour in ("red", "red", "blue")]


def test_a_known_picture_that_is_unchanged_is_neither_read_nor_decoded(world: World) -> None:
    pictures = world.open(world.shown(URL))
    image = only(pictures)
    assert (image.sha256, image.height, image.width) == (sha256(png("red")).hexdigest(), 60, 90)
    assert world.store.read == []
    assert world.store.unchanged == [URL]
    assert buffers() == []


def test_a_known_picture_is_loaded_once_when_the_engine_asks_and_released_with_the_run(
    world: World,
) -> None:
    image, again, _ = world.open(world.shown(URL, URL, OTHER)).images
    assert isinstance(image, KnownImage)
    assert isinstance(again, KnownImage)
    pixels = image.load()
    assert pixels.array()[0, 0].tolist() == [255, 0, 0]
    assert again.load() is pixels
    assert world.store.read == [URL]
    world.close()
    assert buffers() == []


def test_pixels_that_come_after_the_end_of_the_run_are_released_at_once(world: World) -> None:
    image = only(world.open(world.shown(URL)))
    world.close()
    with pytest.raises(Unavailable, match="has ended"):
        image.load()
    assert buffers() == []


def test_a_known_picture_that_changed_is_found_though_the_engine_would_not_read_it(
    world: World,
) -> None:
    work = world.shown(URL, OTHER)
    world.put(URL, png("green"))
    with pytest.raises(ImageChanged, match="on_image_change") as raised:
        world.open(work)
    assert raised.value.param == URL


def test_a_known_picture_that_changes_before_the_engine_reads_it_is_found_then(
    world: World,
) -> None:
    image = only(world.open(world.shown(URL)))
    world.put(URL, png("green"))
    with pytest.raises(ImageChanged):
        image.load()
    world.put(URL, png("red"))
    assert image.load().sha256 == image.sha256


def test_a_known_picture_that_was_written_again_with_the_same_bytes_is_loaded(
    world: World,
) -> None:
    work = world.shown(URL)
    world.put(URL, png("red"))
    assert isinstance(world.open(work).images[0], PixelBuffer)
    assert world.store.read == [URL]


def test_a_known_picture_that_is_gone_or_forbidden_fails_before_the_engine(world: World) -> None:
    folder = world.store.root / "photos"
    for name in ("gone.png", "elsewhere.png"):
        world.put(f"s3://photos/{name}", png("red"))
    gone, elsewhere = world.shown("s3://photos/gone.png"), world.shown("s3://photos/elsewhere.png")
    (folder / "gone.png").unlink()
    with pytest.raises(ImageNotFound):
        world.open(gone)
    (folder / "elsewhere.png").unlink()
    (folder / "elsewhere.png").symlink_to("/etc/hostname")
    with pytest.raises(ImageForbidden):
        world.open(elsewhere)


def test_whoever_accepts_changed_pictures_gets_their_new_content(world: World) -> None:
    work = replace(world.shown(URL), accept_changed_images=True)
    world.put(URL, png("green"))
    [image] = world.open(work).images
    assert image.sha256 == sha256(png("green")).hexdigest()


def test_a_picture_that_the_turn_shows_again_is_loaded(world: World) -> None:
    work = claimed_work(URL, history=world.shown(URL).history)
    pictures = world.open(work)
    assert len(pictures.images) == 2
    assert all(isinstance(image, PixelBuffer) for image in pictures.images)
    assert world.store.read == [URL]
    assert set(pictures.shown) == {URL}


def test_a_picture_of_which_not_all_is_known_is_loaded(world: World) -> None:
    [before] = world.shown(URL).history
    unknown = replace(before, pictures=[None])
    older = replace(before, pictures=[])
    other = replace(before, pictures=[ShownPicture(60, 90, '"another time"')])
    for history in ([unknown], [older], [before, unknown], [before, other]):
        world.store.read.clear()
        images = world.open(claimed_work(history=history)).images
        assert all(isinstance(image, PixelBuffer) for image in images)
        assert world.store.read == [URL]
        world.close()  # while a run has the pixels, the next one would not read the bytes


def test_a_picture_that_another_run_shows_is_not_read_again_and_stays_until_both_have_ended(
    world: World,
) -> None:
    with ExitStack() as first:
        world.stack, own = first, world.stack
        [shown] = world.open(claimed_work(URL)).images
        world.stack = own
        [again] = world.open(claimed_work(URL)).images
        assert world.store.read == world.store.unchanged == [URL]
    assert isinstance(again, PixelBuffer)
    assert isinstance(shown, PixelBuffer)
    assert again.name == shown.name
    assert again.array()[0, 0].tolist() == [255, 0, 0]
    world.put(URL, png("green"))
    [changed] = world.open(claimed_work(URL)).images
    assert changed.sha256 == sha256(png("green")).hexdigest()


def test_a_known_picture_that_another_run_shows_is_lent_from_it(world: World) -> None:
    image = only(world.open(world.shown(URL)))
    [shown] = world.open(claimed_work(URL)).images
    assert isinstance(shown, PixelBuffer)
    assert image.load().name == shown.name
    assert world.store.read == [URL]


def test_a_run_that_fails_or_is_stopped_takes_no_pixels_from_another(world: World) -> None:
    [shown] = world.open(claimed_work(URL)).images
    assert isinstance(shown, PixelBuffer)
    with (
        pytest.raises(ImageNotFound),
        pictures_of(
            claimed_work(URL, "s3://photos/no.png"), world.media, world.pool, lambda: False
        ),
    ):
        pass
    looks = iter([False, True])
    with pictures_of(claimed_work(URL), world.media, world.pool, lambda: next(looks)) as stopped:
        assert stopped is None
    assert buffers() == [shown.name.removeprefix("/")]
    assert shown.array()[0, 0].tolist() == [255, 0, 0]


def test_a_run_that_is_stopped_asks_for_nothing(world: World) -> None:
    work = world.shown(URL)
    world.stopped = True
    with pictures_of(work, world.media, world.pool, lambda: world.stopped) as pictures:
        assert pictures is None
    assert (world.store.read, world.store.unchanged) == ([], [])
