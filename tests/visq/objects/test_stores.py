"""What every object store does, on a real S3 endpoint and on a folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.servers import S3Endpoint
from tests.visq.objects.reading import LIMIT, fetched
from visq.errors import ConfigurationError, ImageNotFound, ImageTooLarge
from visq.objects import FetchedObject, NotModified, ObjectRef, ObjectStore, open_store, parse_uri
from visq.settings import Settings

UNUSUAL_KEYS = [
    "Äpfel und 🍐.jpg",
    "100%20off%.png",
    "why?not=1&x#y.gif",
    "back\\..\\slash.png",
    "/leading//double/trailing/",
    "...",
    "%~looks-like-a-hash",
    "a" * 600,
    "semi;colon:'quote\"<>|*.png",
]


@pytest.mark.parametrize("key", UNUSUAL_KEYS)
def test_an_object_comes_back_under_whatever_key(
    store: ObjectStore, key: str, s3: S3Endpoint
) -> None:
    bucket = s3.create_bucket()
    store.put(ObjectRef(bucket, key), key.encode(), "image/png")
    assert fetched(store, ObjectRef(bucket, key)).data == key.encode()


def test_an_unchanged_object_is_not_read_again(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "cat.jpg")
    store.put(ref, b"one", "image/jpeg")
    etag = fetched(store, ref).etag
    assert store.get(ref, max_bytes=LIMIT, if_none_match=etag) == NotModified()
    store.put(ref, b"two", "image/jpeg")
    again = store.get(ref, max_bytes=LIMIT, if_none_match=etag)
    assert isinstance(again, FetchedObject)
    assert again.data == b"two"


def test_a_missing_object_and_a_missing_bucket_are_not_found(
    store: ObjectStore, bucket: str
) -> None:
    for uri in (f"s3://{bucket}/nothing", "s3://no-such-bucket/cat.jpg"):
        with pytest.raises(ImageNotFound, match=uri):
            store.get(parse_uri(uri), max_bytes=LIMIT)


def test_an_object_of_the_limit_is_read_and_a_larger_one_refused(
    store: ObjectStore, bucket: str
) -> None:
    ref = ObjectRef(bucket, "cat.jpg")
    store.put(ref, bytes(1000), "image/jpeg")
    assert isinstance(store.get(ref, max_bytes=1000), FetchedObject)
    with pytest.raises(ImageTooLarge, match=r"s3://.*cat\.jpg.*999 bytes"):
        store.get(ref, max_bytes=999)


def test_an_empty_object_is_read(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "empty")
    store.put(ref, b"", "image/png")
    assert fetched(store, ref).data == b""


def test_a_store_that_works_answers_a_ping(store: ObjectStore) -> None:
    store.ping()


def test_many_threads_write_one_key_and_none_sees_a_mixture(
    store: ObjectStore, bucket: str
) -> None:
    ref = ObjectRef(bucket, "contested")
    bodies = [bytes([number]) * 50_000 for number in range(8)]
    store.put(ref, bodies[0], "image/png")
    with ThreadPoolExecutor(16) as threads:
        writes = [threads.submit(store.put, ref, body, "image/png") for body in bodies * 3]
        reads = [threads.submit(fetched, store, ref) for _ in range(24)]
        assert all(read.result().data in bodies for read in reads)
        for write in writes:
            write.result()


@pytest.mark.parametrize(
    "url", ["gs://bucket", "file:relative", "file://host/folder", "folder", "S3"]
)
def test_a_store_of_another_kind_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_store(Settings(object_store=url))
