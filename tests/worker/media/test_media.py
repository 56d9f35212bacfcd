"""`Media.load`: from a name to pixels, with a store of each kind and a cache between."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from tests.servers import S3Endpoint
from tests.waiting import until
from tests.worker.media.counting import CountingStore
from visq.errors import (
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    ImageUndecodable,
    InvalidRequest,
    Unavailable,
)
from visq.objects import ObjectRef, ObjectStore, open_store
from visq.pixels import PixelBuffer
from visq.settings import Settings
from worker.media import Media


def jpeg(shade: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), shade).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(params=["s3", "folder"], scope="module")
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("media")
    common: dict[str, object] = {
        "data": folder,
        "s3_buckets": "pictures",
        "upload_bucket": "uploads-of-media",
        "max_image_bytes": 100_000,
    }
    if request.param == "s3":
        s3: S3Endpoint = request.getfixturevalue("s3")
        s3.create_bucket("pictures")
        common |= {
            "object_store": "s3",
            "s3_endpoint_url": s3.url,
            "s3_access_key_id": s3.access_key,
            "s3_secret_access_key": s3.secret_key,
        }
    return Settings.model_validate(common)


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


def test_a_picture_is_loaded_with_the_hash_of_its_encoded_bytes(
    media: Media, store: ObjectStore
) -> None:
    store.put(ObjectRef("pictures", "a b.jpg"), jpeg(), "image/jpeg")
    buffer = media.load("s3://pictures/a b.jpg", "ann").pixels
    assert (buffer.height, buffer.width) == (48, 64)
    assert buffer.sha256 == sha256(jpeg()).hexdigest()
    assert buffer.array()[10, 10].tolist() == [254, 0, 0]
    buffer.release()


def test_a_changed_picture_is_seen_at_once(media: Media, store: ObjectStore) -> None:
    for shade in ("red", "blue"):
        store.put(ObjectRef("pictures", "changing.jpg"), jpeg(shade), "image/jpeg")
        buffer = media.load("s3://pictures/changing.jpg", "ann").pixels
        assert buffer.sha256 == sha256(jpeg(shade)).hexdigest()
        buffer.release()


def test_an_unchanged_picture_is_not_loaded_and_a_changed_one_is(
    media: Media, store: ObjectStore
) -> None:
    ref = ObjectRef("pictures", "known.jpg")
    store.put(ref, jpeg("red"), "image/jpeg")
    known = media.load(ref.uri, "ann")
    known.pixels.release()
    assert known.etag is not None
    assert media.load_if_changed(ref.uri, "ann", known.etag) is None
    store.put(ref, jpeg("blue"), "image/jpeg")
    changed = media.load_if_changed(ref.uri, "ann", known.etag)
    assert changed is not None
    assert changed.pixels.sha256 == sha256(jpeg("blue")).hexdigest()
    assert changed.etag != known.etag
    changed.pixels.release()


def test_threads_that_load_one_picture_each_own_their_pixels(
    media: Media, store: ObjectStore
) -> None:
    store.put(ObjectRef("pictures", "shared.jpg"), jpeg(), "image/jpeg")
    with ThreadPoolExecutor(8) as threads:
        loads = [threads.submit(media.load, "s3://pictures/shared.jpg", "ann") for _ in range(8)]
        buffers = [load.result().pixels for load in loads]
    assert len({buffer.name for buffer in buffers}) == 1
    for buffer in buffers:
        assert buffer.array().shape == (48, 64, 3)
        buffer.release()


def test_two_names_of_one_content_share_its_pixels_and_not_each_others_names_in_errors(
    media: Media, store: ObjectStore
) -> None:
    for key in ("one.jpg", "two.jpg"):
        store.put(ObjectRef("pictures", key), jpeg("yellow"), "image/jpeg")
    loads = [media.load(f"s3://pictures/{key}", "ann").pixels for key in ("one.jpg", "two.jpg")]
    assert loads[0].name == loads[1].name
    for pixels in loads:
        pixels.release()

    for key in ("three.jpg", "four.jpg"):
        store.put(ObjectRef("pictures", key), jpeg("yellow")[:400], "image/jpeg")
    decoded = threading.Event()
    decode = media._pixels._decode

    def late(data: bytes, digest: str) -> PixelBuffer:
        decoded.wait(30)
        return decode(data, digest)

    digest = sha256(jpeg("yellow")[:400]).hexdigest()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(media._pixels, "_decode", late)
        broken = {
            key: threads.submit(media.load, f"s3://pictures/{key}", "ann")
            for key in ("three.jpg", "four.jpg")
        }
        used = media._pixels._used
        until(lambda: digest in used and len(used[digest].users) == 2, 30, "both to wait")
        decoded.set()
        for key, load in broken.items():
            with pytest.raises(ImageUndecodable, match=f"^image s3://pictures/{key} is"):
                load.result()


def test_pixels_that_are_here_are_shown_without_reading_bytes_while_the_store_says_unchanged(
    settings: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    counting = CountingStore(store)
    given = settings.model_copy(update={"media_cache": tmp_path})
    media = Media(given, counting)  # type: ignore[arg-type]
    ref = ObjectRef("pictures", "kept.jpg")

    def show(shade: str) -> str:
        store.put(ref, jpeg(shade), "image/jpeg")
        names = set()
        for _ in range(3):
            pixels = media.load(ref.uri, "ann").pixels
            assert pixels.sha256 == sha256(jpeg(shade)).hexdigest()
            names.add(pixels.name)
            pixels.release()
            for path in tmp_path.iterdir():
                path.unlink()  # what is fetched would now have to be read
        [name] = names
        return name

    first = show("red")
    assert (counting.full, counting.unchanged) == (1, 2)
    assert show("blue") != first
    assert (counting.full, counting.unchanged) == (2, 4)
    assert show("red") == first, "it is the content that counts"
    assert (counting.full, counting.unchanged) == (3, 6)
    media.close()
    with pytest.raises(Unavailable):
        media.load("s3://pictures/a b.jpg", "ann")
    assert not Path(f"/dev/shm{first}").exists()


def test_a_named_version_whose_pixels_are_here_is_not_asked_for(
    s3: S3Endpoint, bucket: str, tmp_path: Path
) -> None:
    client = s3.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    version = client.put_object(Bucket=bucket, Key="a.jpg", Body=jpeg())["VersionId"]
    client.put_object(Bucket=bucket, Key="a.jpg", Body=jpeg("blue"))
    given = {name.removeprefix("VISQ_").lower(): value for name, value in s3.environment.items()}
    settings = Settings.model_validate(given | {"data": tmp_path, "media_cache_bytes": 0})
    counting = CountingStore(open_store(settings))
    media = Media(settings, counting)  # type: ignore[arg-type]
    for _ in range(3):
        pixels = media.load(ObjectRef(bucket, "a.jpg", version).uri, "ann").pixels
        assert pixels.sha256 == sha256(jpeg()).hexdigest()
        pixels.release()
    assert (counting.full, counting.unchanged) == (1, 0)
    media.close()
    counting.close()


@pytest.mark.parametrize("asked", [0, 1000, 10**12])
def test_at_most_an_eighth_of_shared_memory_is_kept(
    settings: Settings, store: ObjectStore, asked: int
) -> None:
    media = Media(settings.model_copy(update={"pixel_cache_bytes": asked}), store)
    eighth = shutil.disk_usage("/dev/shm").total // 8
    assert media._pixels._max_bytes == min(asked, eighth)
    media.close()


def test_a_tenants_upload_is_loaded_for_it_and_for_nobody_else(
    media: Media, store: ObjectStore
) -> None:
    store.put(ObjectRef("uploads-of-media", "ann/1"), jpeg(), "image/jpeg")
    media.load("s3://uploads-of-media/ann/1", "ann").pixels.release()
    with pytest.raises(ImageForbidden, match="s3://uploads-of-media/ann/1"):
        media.load("s3://uploads-of-media/ann/1", "bob")
    with pytest.raises(ImageForbidden, match="s3://uploads-of-media/ann/1"):
        media.load_if_changed("s3://uploads-of-media/ann/1", "bob", "any")


@pytest.mark.parametrize(
    ("key", "data", "error"),
    [
        ("missing.jpg", None, ImageNotFound),
        ("text.jpg", b"hello", ImageUndecodable),
        ("cut.jpg", jpeg()[:400], ImageUndecodable),
        ("large.jpg", bytes(100_001), ImageTooLarge),
    ],
)
def test_an_image_that_cannot_be_shown_is_named_in_its_error(
    media: Media, store: ObjectStore, key: str, data: bytes | None, error: type[Exception]
) -> None:
    if data is not None:
        store.put(ObjectRef("pictures", key), data, "image/jpeg")
    with pytest.raises(error, match=f"image s3://pictures/{key} "):
        media.load(f"s3://pictures/{key}", "ann")


@pytest.mark.parametrize(
    "uri", ["data:image/png;base64,AAAA", "ftp://pictures/a", "file:///etc/passwd", "/etc/passwd"]
)
def test_only_names_of_the_store_and_urls_are_loaded(media: Media, uri: str) -> None:
    with pytest.raises(InvalidRequest):
        media.load(uri, "ann")


def test_a_bucket_that_is_not_listed_is_forbidden(media: Media) -> None:
    with pytest.raises(ImageForbidden):
        media.load("s3://other/a.jpg", "ann")


def test_only_a_remote_store_is_cached(
    media: Media, store: ObjectStore, settings: Settings
) -> None:
    store.put(ObjectRef("pictures", "cached.jpg"), jpeg("green"), "image/jpeg")
    media.load("s3://pictures/cached.jpg", "ann").pixels.release()
    cache: Path = settings.data / "media-cache"
    assert cache.exists() == store.remote
    assert not cache.exists() or any(cache.iterdir())


def test_an_unusable_cache_folder_does_not_fail_a_load(
    settings: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    broken = settings.model_copy(update={"media_cache": tmp_path / "file" / "cache"})
    store.put(ObjectRef("pictures", "b.jpg"), jpeg(), "image/jpeg")
    media = Media(broken, store)
    media.load("s3://pictures/b.jpg", "ann").pixels.release()
    media.close()
