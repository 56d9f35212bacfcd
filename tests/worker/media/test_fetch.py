"""Fetching through the cache, against a real S3 endpoint; one read for all who ask together."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from tests.servers import S3Endpoint
from tests.waiting import until
from tests.worker.media.conftest import DISK
from tests.worker.media.counting import CountingStore
from visq.errors import ImageFetchFailed, ImageNotFound, ImageTooLarge
from visq.objects import ObjectRef, open_store
from visq.settings import Settings
from worker.media.cache import DiskCache
from worker.media.fetch import Fetcher

MIB = 1024 * 1024


@pytest.fixture
def store(s3: S3Endpoint) -> Iterator[CountingStore]:
    settings = Settings.model_validate(
        {
            "object_store": "s3",
            "s3_endpoint_url": s3.url,
            "s3_access_key_id": s3.access_key,
            "s3_secret_access_key": s3.secret_key,
        }
    )
    found = CountingStore(open_store(settings))
    yield found
    found.close()


@pytest.fixture
def fetcher(store: CountingStore, tmp_path: Path) -> Fetcher:
    return Fetcher(store, max_bytes=MIB, concurrency=4, cache=DiskCache(tmp_path, 100 * MIB))


def test_an_unchanged_object_is_asked_for_and_not_read_again(
    fetcher: Fetcher, store: CountingStore, bucket: str
) -> None:
    ref = ObjectRef(bucket, "a")
    store.put(ref, b"one", "image/png")
    for _ in range(3):
        image = fetcher.fetch(ref)
        assert (image.data, image.sha256) == (b"one", sha256(b"one").hexdigest())
    assert (store.full, store.unchanged) == (1, 2)


def test_a_full_disk_fails_no_fetch(store: CountingStore, bucket: str, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(DISK - 4096))
    cache = DiskCache(small_disk, 100 * MIB)
    fetcher = Fetcher(store, max_bytes=MIB, concurrency=4, cache=cache)
    ref = ObjectRef(bucket, "a")
    store.put(ref, bytes(20_000), "image/png")
    for _ in range(2):
        assert fetcher.fetch(ref).data == bytes(20_000)
    assert (store.full, store.unchanged) == (2, 0)


def test_a_changed_object_is_read_again(
    fetcher: Fetcher, store: CountingStore, bucket: str
) -> None:
    ref = ObjectRef(bucket, "a")
    for data in (b"one", b"two"):
        store.put(ref, data, "image/png")
        assert fetcher.fetch(ref).data == data
        assert fetcher.fetch(ref).data == data
    assert (store.full, store.unchanged) == (2, 2)


def test_what_the_caller_knows_by_its_etag_is_not_read_though_no_cache_has_it(
    store: CountingStore, bucket: str
) -> None:
    fetcher = Fetcher(store, max_bytes=MIB, concurrency=4, cache=None)
    ref = ObjectRef(bucket, "a")
    store.put(ref, b"one", "image/png")
    etag = fetcher.fetch(ref).etag
    assert etag is not None
    assert fetcher.fetch_if_changed(ref, etag) is None
    assert (store.full, store.unchanged) == (1, 1)
    store.put(ref, b"two", "image/png")
    changed = fetcher.fetch_if_changed(ref, etag)
    assert changed is not None
    assert changed.data == b"two"
    assert (store.full, store.unchanged) == (2, 1)


def test_a_changed_object_that_was_asked_for_by_its_etag_is_kept_in_the_cache(
    fetcher: Fetcher, store: CountingStore, bucket: str
) -> None:
    ref = ObjectRef(bucket, "a")
    store.put(ref, b"two", "image/png")
    assert fetcher.fetch_if_changed(ref, '"of another content"') is not None
    assert fetcher.fetch(ref).data == b"two"
    assert (store.full, store.unchanged) == (1, 1)


def test_a_named_version_is_asked_for_once(
    fetcher: Fetcher, store: CountingStore, bucket: str, s3: S3Endpoint
) -> None:
    client = s3.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    version = client.put_object(Bucket=bucket, Key="a", Body=b"one")["VersionId"]
    client.put_object(Bucket=bucket, Key="a", Body=b"two")
    for _ in range(3):
        assert fetcher.fetch(ObjectRef(bucket, "a", version)).data == b"one"
    assert (store.full, store.unchanged) == (1, 0)


def test_a_deleted_object_is_not_found_though_it_is_in_the_cache(
    fetcher: Fetcher, store: CountingStore, bucket: str, s3: S3Endpoint, tmp_path: Path
) -> None:
    ref = ObjectRef(bucket, "a")
    store.put(ref, b"one", "image/png")
    etag = fetcher.fetch(ref).etag
    assert etag is not None
    s3.client().delete_object(Bucket=bucket, Key="a")
    with pytest.raises(ImageNotFound):
        fetcher.fetch_if_changed(ref, etag)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ImageNotFound):
        fetcher.fetch(ref)


def test_a_smaller_limit_holds_for_what_is_in_the_cache(
    fetcher: Fetcher, store: CountingStore, bucket: str, tmp_path: Path
) -> None:
    ref = ObjectRef(bucket, "a")
    store.put(ref, bytes(1000), "image/png")
    fetcher.fetch(ref)
    cache = DiskCache(tmp_path, 100 * MIB)
    with pytest.raises(ImageTooLarge):
        Fetcher(store, max_bytes=999, concurrency=1, cache=cache).fetch(ref)


def test_who_asks_while_an_object_is_on_its_way_shares_the_read(
    store: CountingStore, bucket: str
) -> None:
    fetcher = Fetcher(store, max_bytes=MIB, concurrency=8, cache=None)
    ref = ObjectRef(bucket, "a")
    store.put(ref, b"one", "image/png")
    store.open.clear()
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(fetcher.fetch, ref) for _ in range(8)]
        until(lambda: store.inside == 1 and all(a.running() for a in asked), 20, "all to ask")
        store.open.set()
        assert {request.result().data for request in asked} == {b"one"}
    assert store.most_inside == 1


def test_a_failure_is_shared_too_and_the_next_request_tries_again(
    store: CountingStore, bucket: str
) -> None:
    fetcher = Fetcher(store, max_bytes=MIB, concurrency=8, cache=None)
    ref = ObjectRef(bucket, "a")
    store.open.clear()
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(fetcher.fetch, ref) for _ in range(4)]
        until(lambda: store.inside == 1 and all(a.running() for a in asked), 20, "all to ask")
        store.open.set()
        assert all(isinstance(request.exception(), ImageNotFound) for request in asked)
    store.put(ref, b"one", "image/png")
    assert fetcher.fetch(ref).data == b"one"


def test_no_more_objects_are_read_at_a_time_than_allowed(store: CountingStore, bucket: str) -> None:
    fetcher = Fetcher(store, max_bytes=MIB, concurrency=3, cache=None)
    refs = [ObjectRef(bucket, str(number)) for number in range(12)]
    for ref in refs:
        store.put(ref, b"one", "image/png")
    store.open.clear()
    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(fetcher.fetch, ref) for ref in refs]
        until(lambda: store.inside == 3 and all(a.running() for a in asked), 20, "three readers")
        store.open.set()
        assert all(request.result().data == b"one" for request in asked)
    assert store.most_inside == 3


def test_a_cached_object_is_not_shown_while_the_store_is_down(
    store: CountingStore, tmp_path: Path, servers_dir: Path
) -> None:
    with S3Endpoint(servers_dir / "s3-that-stops") as endpoint:
        settings = Settings.model_validate(
            {
                "object_store": "s3",
                "s3_endpoint_url": endpoint.url,
                "s3_access_key_id": endpoint.access_key,
                "s3_secret_access_key": endpoint.secret_key,
            }
        )
        stopping = open_store(settings)
        ref = ObjectRef(endpoint.create_bucket(), "a")
        stopping.put(ref, b"one", "image/png")
        cache = DiskCache(tmp_path, 100 * MIB)
        fetcher = Fetcher(stopping, max_bytes=MIB, concurrency=1, cache=cache)
        assert fetcher.fetch(ref).data == b"one"
        endpoint.kill()
        with pytest.raises(ImageFetchFailed):
            fetcher.fetch(ref)
        stopping.close()
