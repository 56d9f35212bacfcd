"""`Media.load` of URLs: the web through the same fetcher, cache and decoders as the store."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from tests.waiting import until
from tests.website import Visit, Website
from visq.errors import (
    ImageError,
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    ImageUndecodable,
)
from visq.objects import ObjectRef, ObjectStore, open_store
from visq.settings import Settings
from worker.media import LoadedImage, Media

pytestmark = pytest.mark.timeout(60)

THREADS = 8


def png(shade: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), shade).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[Website]:
    with Website() as site:
        yield site


@pytest.fixture
def site(server: Website) -> Website:
    server.asked.clear()
    server.pages.clear()
    return server


@pytest.fixture(scope="module")
def settings(server: Website, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        data=tmp_path_factory.mktemp("media"),
        max_image_bytes=100_000,
        fetch_concurrency=4,
        fetch_total_seconds=3,
        image_url_hosts=server.host,
    )


@pytest.fixture(scope="module")
def store(settings: Settings) -> Iterator[ObjectStore]:
    found = open_store(settings)
    yield found
    found.close()


@pytest.fixture(scope="module")
def media(settings: Settings, store: ObjectStore) -> Iterator[Media]:
    found = Media(settings, store)
    yield found
    found.close()


def hash_of(loaded: LoadedImage | None) -> str:
    assert loaded is not None
    loaded.pixels.release()
    return loaded.pixels.sha256


def test_a_picture_of_the_web_is_loaded_whatever_its_server_calls_it(
    media: Media, site: Website
) -> None:
    url = site.show("/a", png(), Content_Type="text/html")
    loaded = media.load(url, "ann")
    assert (loaded.pixels.height, loaded.pixels.width, loaded.etag) == (48, 64, None)
    assert loaded.pixels.array()[10, 10].tolist() == [255, 0, 0]
    assert hash_of(loaded) == sha256(png()).hexdigest()


def test_one_with_an_etag_is_read_once_and_asked_for_at_every_load(
    media: Media, site: Website
) -> None:
    url = site.show("/cached", png(), '"1"')
    for _ in range(3):
        assert hash_of(media.load(url, "ann")) == sha256(png()).hexdigest()
    assert [visit.headers.get("if-none-match") for visit in site.asked] == [None, '"1"', '"1"']
    site.show("/cached", png("blue"), '"2"')
    assert hash_of(media.load(url, "ann")) == sha256(png("blue")).hexdigest()


def test_one_without_an_etag_is_read_at_every_load(media: Media, site: Website) -> None:
    url = site.show("/uncached", png())
    for shade in ("red", "blue"):
        site.show("/uncached", png(shade))
        assert hash_of(media.load(url, "ann")) == sha256(png(shade)).hexdigest()


def test_two_urls_that_differ_in_their_query_are_two_pictures(media: Media, site: Website) -> None:
    def page(visit: Visit) -> None:
        visit.answer(200, png(visit.path.partition("?")[2]), ETag='"1"')

    url = site.page("/query", page)
    for _ in range(2):
        for shade in ("red", "blue"):
            loaded = media.load(f"{url}?{shade}", "ann")
            assert hash_of(loaded) == sha256(png(shade)).hexdigest()


def test_the_cache_keeps_no_query_of_a_url(media: Media, site: Website, settings: Settings) -> None:
    site.show("/signed", png(), '"1"')
    hash_of(media.load(site.url("/signed?signature=s3cret"), "ann"))
    files = [
        path for path in (settings.data / "media-cache").iterdir() if b"/signed" in _head(path)
    ]
    assert len(files) == 1
    assert b"s3cret" not in _head(files[0])


def _head(path: Path) -> bytes:
    return path.read_bytes().partition(b"\n")[0]


def test_an_unchanged_picture_is_not_loaded_and_a_changed_one_is(
    media: Media, site: Website
) -> None:
    url = site.show("/known", png(), '"1"')
    assert media.load_if_changed(url, "ann", '"1"') is None
    site.show("/known", png("blue"), '"2"')
    assert hash_of(media.load_if_changed(url, "ann", '"1"')) == sha256(png("blue")).hexdigest()


def test_who_asks_while_a_picture_is_on_its_way_shares_the_read(
    media: Media, site: Website
) -> None:
    goes_on = threading.Event()

    def page(visit: Visit) -> None:
        goes_on.wait(20)
        visit.answer(200, png())

    url = site.page("/shared", page)
    with ThreadPoolExecutor(THREADS) as threads:
        loads = [threads.submit(media.load, url, "ann") for _ in range(THREADS)]
        until(lambda: site.asked and all(load.running() for load in loads), 20, "all to ask")
        goes_on.set()
        for load in loads:
            hash_of(load.result())
    assert len(site.asked) == 1


def test_hosts_that_hang_keep_no_slot_of_the_store(
    media: Media, site: Website, store: ObjectStore, settings: Settings
) -> None:
    store.put(ObjectRef("pictures", "a.png"), png(), "image/png")
    for number in range(settings.fetch_concurrency):
        site.page(f"/{number}", lambda visit: visit.silence())
    with ThreadPoolExecutor(THREADS) as threads:
        urls = [site.url(f"/{number}") for number in range(settings.fetch_concurrency)]
        hanging = [threads.submit(media.load, url, "ann") for url in urls]
        until(lambda: len(site.asked) == settings.fetch_concurrency - 1, 20, "the host to be full")
        hash_of(media.load("s3://pictures/a.png", "ann"))
        assert not any(load.done() for load in hanging)
        for load in hanging:
            assert isinstance(load.exception(), ImageFetchFailed)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/missing", ImageNotFound),
        ("/text", ImageUndecodable),
        ("/cut", ImageUndecodable),
        ("/large", ImageTooLarge),
        ("/down", ImageFetchFailed),
    ],
)
def test_a_picture_that_cannot_be_shown_is_named_without_its_query(
    media: Media, site: Website, path: str, error: type[ImageError]
) -> None:
    site.show("/text", b"<html>", Content_Type="image/png")
    site.show("/cut", png()[:-30])
    site.show("/large", bytes(100_001))
    site.page("/down", lambda visit: visit.answer(503))
    with pytest.raises(error) as raised:
        media.load(site.url(f"{path}?signature=s3cret"), "ann")
    assert raised.value.message.startswith(f"image {site.url(path)} ")
    assert "s3cret" not in raised.value.message
    assert raised.value.retryable is (error is ImageFetchFailed)


def test_one_that_is_gone_leaves_the_cache(media: Media, site: Website) -> None:
    url = site.show("/gone", png(), '"1"')
    hash_of(media.load(url, "ann"))
    site.pages.clear()
    with pytest.raises(ImageNotFound):
        media.load(url, "ann")
    site.show("/gone", png(), '"1"')
    hash_of(media.load(url, "ann"))
    assert [visit.headers.get("if-none-match") for visit in site.asked] == [None, '"1"', None]


def test_a_url_is_checked_again_by_the_worker(media: Media, site: Website) -> None:
    for url in (f"http://localhost:{site.port}/a", f"https://localhost:{site.port}/a"):
        with pytest.raises(ImageForbidden):
            media.load(url, "ann")
        with pytest.raises(ImageForbidden):
            media.load_if_changed(url, "ann", '"1"')
    assert site.asked == []
