"""A store that is slow, fails or lies: no picture is shown that is not whole, no wait is without
end, and others go on beside it. (The jobs over such a store are in `test_store_jobs`.)"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from tests.faults.store import (
    Fault,
    LyingStore,
    Refuse,
    Reset,
    Shorten,
    Silence,
    Slow,
    Then,
    Truncate,
    WrongETag,
)
from tests.servers import S3Endpoint
from tests.waiting import until
from tests.worker.playing import claimed_work
from visq.errors import ImageFetchFailed, ImageNotFound, ImageUndecodable
from visq.objects import ObjectRef, ObjectStore, open_store
from visq.pixels import NAME_PREFIX
from visq.settings import Settings
from worker.media import LoadedImage, Media
from worker.pictures import pictures_of

TOTAL = 1.2
"""Seconds that one image may take."""
SLOTS = 8

pytestmark = pytest.mark.timeout(180)


def png(colour: str) -> bytes:
    """A picture of some kilobytes, so that a part of it is no small matter."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8))
    noise.paste(colour, (0, 0, 40, 40))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def lying(s3: S3Endpoint) -> Iterator[LyingStore]:
    with LyingStore(s3) as lying:
        yield lying


@pytest.fixture
def well(lying: LyingStore) -> Iterator[LyingStore]:
    """The store, which tells the truth until the test says otherwise."""
    yield lying
    lying.heal()


@pytest.fixture(scope="module")
def store(s3: S3Endpoint, lying: LyingStore) -> Iterator[ObjectStore]:
    store = open_store(
        Settings.model_validate(
            {
                "object_store": "s3",
                "s3_endpoint_url": lying.url,
                "s3_region": s3.region,
                "s3_access_key_id": s3.access_key,
                "s3_secret_access_key": s3.secret_key,
                "fetch_timeout_seconds": 0.5,
                "fetch_total_seconds": TOTAL,
                "fetch_concurrency": SLOTS,
            }
        )
    )
    yield store
    store.close()


@pytest.fixture(scope="module")
def media(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Media]:
    settings = Settings(
        data=tmp_path_factory.mktemp("media"),
        fetch_concurrency=SLOTS,
        fetch_total_seconds=TOTAL,
        pixel_cache_bytes=0,
    )
    media = Media(settings, store)
    yield media
    media.close()
    assert pixels_left() == []


def pixels_left() -> list[str]:
    """What this process has in shared memory."""
    ours = f"{NAME_PREFIX}{os.getpid()}-"
    return [name for name in os.listdir("/dev/shm") if f"/{name}".startswith(ours)]


class Bucket:
    """A bucket of its own for each test, written to behind the proxy's back."""

    def __init__(self, s3: S3Endpoint) -> None:
        self._client = s3.client()
        self.name = s3.create_bucket()

    def put(self, data: bytes, key: str = "a.png", **options: str) -> None:
        options = {"ChecksumAlgorithm": "CRC32", **options}
        self._client.put_object(Bucket=self.name, Key=key, Body=data, **options)  # type: ignore[arg-type]

    def delete(self, key: str = "a.png") -> None:
        self._client.delete_object(Bucket=self.name, Key=key)

    def ref(self, key: str = "a.png") -> ObjectRef:
        return ObjectRef(self.name, key)

    def url(self, key: str = "a.png") -> str:
        return self.ref(key).uri


@pytest.fixture
def bucket(s3: S3Endpoint) -> Bucket:
    return Bucket(s3)


def seen(loaded: LoadedImage) -> str:
    """The hash of what was loaded, which is then let go."""
    loaded.pixels.release()
    return loaded.pixels.sha256


# --- one picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Silence(),
        Slow(first_byte=60),
        Slow(between=0.1),
        Slow(between=0.1, headers=True),
        Slow(between=0.4, piece=100),
        Refuse(503, "SlowDown"),
        Refuse(500, "InternalError"),
        Truncate(),
        Truncate(share=0.0),
        Shorten(),
        Reset(),
        Reset(share=0.5),
    ],
    ids=repr,
)
def test_a_fault_is_a_failed_fetch_in_time_and_once_it_is_over_the_picture_comes(
    well: LyingStore, media: Media, bucket: Bucket, fault: Fault
) -> None:
    bucket.put(png("red"))
    well.lie(fault, f"{bucket.name}/")
    began = time.monotonic()
    with pytest.raises(ImageFetchFailed, match=f"image {bucket.url()} could not be fetched") as how:
        media.load(bucket.url(), "ann")
    assert how.value.retryable
    assert time.monotonic() - began < TOTAL + 0.7  # the limit itself; threads here share two cores
    assert well.count(f"{bucket.name}/a.png") <= 4
    well.heal()
    assert seen(media.load(bucket.url(), "ann")) == sha256(png("red")).hexdigest()
    assert pixels_left() == []


def test_a_fault_that_passes_by_itself_is_not_even_noticed(
    well: LyingStore, media: Media, bucket: Bucket
) -> None:
    bucket.put(png("red"))
    for fault in (Refuse(503, "SlowDown"), Truncate(share=0.9), Reset(share=0.1)):
        well.lie(fault, f"{bucket.name}/", times=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visq.objects.s3_calls._BACKOFF_SECONDS", 0.05)
        assert seen(media.load(bucket.url(), "ann")) == sha256(png("red")).hexdigest()
    assert well.count(f"{bucket.name}/a.png") == 4


def test_of_a_store_without_checksums_a_part_that_claims_to_be_all_is_no_picture(
    well: LyingStore, media: Media, store: ObjectStore, bucket: Bucket
) -> None:
    store.put(bucket.ref(), png("red"), "image/png")
    well.lie(Shorten(), f"{bucket.name}/")
    with pytest.raises(ImageUndecodable, match=r"damaged or cut-off"):
        media.load(bucket.url(), "ann")
    well.heal()
    assert seen(media.load(bucket.url(), "ann")) == sha256(png("red")).hexdigest()


def test_an_object_that_changes_while_it_is_read_is_one_version_or_the_other_never_both(
    well: LyingStore, media: Media, bucket: Bucket
) -> None:
    bucket.put(png("red"))
    well.lie(Truncate(then=lambda: bucket.put(png("blue"))), f"{bucket.name}/", times=1)
    loaded = media.load(bucket.url(), "ann")
    assert loaded.pixels.array()[20, 20].tolist() == [0, 0, 255]
    assert seen(loaded) == sha256(png("blue")).hexdigest()


def test_an_object_that_goes_while_it_is_read_is_not_found(
    well: LyingStore, media: Media, bucket: Bucket
) -> None:
    bucket.put(png("red"))
    well.lie(Truncate(then=bucket.delete), f"{bucket.name}/", times=1)
    with pytest.raises(ImageNotFound):
        media.load(bucket.url(), "ann")
    assert well.count(f"{bucket.name}/a.png") == 2


def test_what_came_under_a_wrong_etag_is_asked_for_again_and_read_anew(
    well: LyingStore, media: Media, bucket: Bucket
) -> None:
    bucket.put(png("red"))
    well.lie(WrongETag(), f"{bucket.name}/", times=1)
    assert seen(media.load(bucket.url(), "ann")) == sha256(png("red")).hexdigest()
    bucket.put(png("blue"))
    for _ in range(2):
        assert seen(media.load(bucket.url(), "ann")) == sha256(png("blue")).hexdigest()
    first, second, third = well.requests[-3:]
    assert "If-None-Match" not in first.headers
    assert second.headers["If-None-Match"] == '"of-something-else"'
    assert third.headers["If-None-Match"] != '"of-something-else"'


def test_an_object_that_changes_after_its_reading_is_seen_by_the_next_reader(
    well: LyingStore, media: Media, bucket: Bucket
) -> None:
    bucket.put(png("red"))
    well.lie(Then(lambda: bucket.put(png("blue"))), f"{bucket.name}/", times=1)
    hashes = [seen(media.load(bucket.url(), "ann")) for _ in range(2)]
    assert hashes == [sha256(png(colour)).hexdigest() for colour in ("red", "blue")]


# --- many pictures -------------------------------------------------------------------------------


def test_pictures_of_other_buckets_come_while_one_bucket_hangs_however_many_wait_for_it(
    well: LyingStore, media: Media, bucket: Bucket, s3: S3Endpoint
) -> None:
    other = Bucket(s3)
    for number in range(10):
        other.put(png("red"), f"{number}.png")
    well.lie(Silence(), f"{bucket.name}/")
    with ThreadPoolExecutor(40) as threads:
        hanging = [
            threads.submit(media.load, bucket.url(f"{number}.png"), "ann") for number in range(40)
        ]
        until(lambda: sum(well.inside.values()) == SLOTS * 3 // 4, 5, "its share of the slots")
        began = time.monotonic()
        for number in range(10):
            seen(media.load(other.url(f"{number}.png"), "ann"))
        assert time.monotonic() - began < TOTAL / 2
        assert not any(each.done() for each in hanging)
        for each in hanging:
            assert isinstance(each.exception(), ImageFetchFailed)
        # 40 of them by 6 at a time would take 7 times as long as one.
        assert time.monotonic() - began < 3 * TOTAL


def test_a_job_of_several_pictures_goes_on_though_all_threads_for_them_hang(
    well: LyingStore, media: Media, bucket: Bucket, s3: S3Endpoint
) -> None:
    other = Bucket(s3)
    for number in range(3):
        other.put(png("red"), f"{number}.png")
    well.lie(Silence(), f"{bucket.name}/")
    with ThreadPoolExecutor(2) as pool:
        hanging = [pool.submit(media.load, bucket.url(f"{n}.png"), "ann") for n in range(4)]
        until(lambda: sum(well.inside.values()) == 2, 5, "all threads to hang")
        shown = claimed_work(*(other.url(f"{number}.png") for number in range(3)))
        with pictures_of(shown, media, pool, lambda: False) as pictures:
            assert pictures is not None
            assert len(pictures.images) == 3
        assert not hanging[0].done()
        well.heal()
    assert pixels_left() == []


def test_a_job_waits_once_for_a_store_that_hangs_not_once_for_each_picture(
    well: LyingStore, media: Media, bucket: Bucket
) -> None:
    well.lie(Silence(), f"{bucket.name}/")
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        shown = claimed_work(*(bucket.url(f"{number}.png") for number in range(6)))
        with pytest.raises(ImageFetchFailed), pictures_of(shown, media, pool, lambda: False):
            pass
    assert time.monotonic() - began < 2 * TOTAL
