"""Objects of any size, read and written in pieces: what both stores promise."""

from __future__ import annotations

import gc
import gzip
import io
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.servers import S3Endpoint
from tests.visq.objects.reading import fetched
from visq.errors import InvalidRequest, ObjectChanged, ObjectNotFound
from visq.objects import ObjectRef, ObjectStore, parse_uri
from visq.objects.s3_reading import READ_BYTES
from visq.objects.s3_writing import PART_BYTES

MB = 1_000_000
LINES = [b'{"number": %07d, "text": "%s"}\n' % (number, b"x" * 60) for number in range(220_000)]
TEXT = b"".join(LINES)
assert len(TEXT) > 2 * PART_BYTES + MB, "less than three parts"


def write(store: ObjectStore, ref: ObjectRef, data: bytes, piece: int = 777_777) -> None:
    with store.write(ref, "application/jsonl") as file:
        for start in range(0, len(data), piece):
            file.write(data[start : start + piece])


def write_and_fail(
    store: ObjectStore, ref: ObjectRef, data: bytes, before: Callable[[], object] = lambda: None
) -> None:
    with store.write(ref, "text/plain") as file:
        file.write(data)
        before()
        _ = 1 / 0


def keys(store: ObjectStore, bucket: str, prefix: str = "", after: str | None = None) -> list[str]:
    return [each.key for each in store.list(bucket, prefix, after=after)]


@pytest.fixture
def ref(store: ObjectStore, bucket: str) -> ObjectRef:
    """An object that is not there, in a bucket that is."""
    store.put(ObjectRef(bucket, "another"), b"1", "text/plain")
    return ObjectRef(bucket, "in/pieces.jsonl")


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    gc.collect()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / MB:.1f} MB"


# --- writing and reading -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, len(TEXT)])
def test_what_was_written_in_pieces_is_read(store: ObjectStore, ref: ObjectRef, size: int) -> None:
    write(store, ref, TEXT[:size])
    with store.open(ref) as file:
        assert file.read() == TEXT[:size]
        assert file.read() == b""
    assert store.stat(ref).size == size


def test_one_piece_may_be_larger_than_memory_for_it(store: ObjectStore, ref: ObjectRef) -> None:
    write(store, ref, TEXT, piece=len(TEXT))
    with store.open(ref) as file:
        assert file.read(len(TEXT) + 1) == TEXT


def test_lines_come_one_by_one(store: ObjectStore, ref: ObjectRef) -> None:
    write(store, ref, TEXT)
    with store.open(ref) as file:
        assert all(line == LINES[number] for number, line in enumerate(file))
        assert file.tell() == len(TEXT)


def test_a_reader_goes_to_any_place(store: ObjectStore, ref: ObjectRef) -> None:
    write(store, ref, TEXT)
    with store.open(ref) as file:
        for place in (len(TEXT) - 10, 5, READ_BYTES - 1, READ_BYTES, 2 * READ_BYTES + 3):
            assert file.seek(place) == place
            assert file.read(100) == TEXT[place : place + 100]
        assert file.seek(-4, io.SEEK_END) == len(TEXT) - 4
        assert file.read() == TEXT[-4:]
        file.seek(-8, io.SEEK_CUR)
        assert file.read(4) == TEXT[-8:-4]
        file.seek(10, io.SEEK_END)
        assert file.read(1) == b""


def test_memory_stays_flat_over_a_large_object(store: ObjectStore, ref: ObjectRef) -> None:
    piece = bytes(range(256)) * 1024
    with memory_below(50 * MB), store.write(ref, "text/plain") as file:
        for _ in range(400):
            file.write(piece)
    with memory_below(25 * MB), store.open(ref) as file:
        size = sum(len(read) for read in iter(lambda: file.read(MB), b""))
    assert size == 400 * len(piece)


def test_parquet_is_written_and_read(store: ObjectStore, ref: ObjectRef) -> None:
    table = pa.table({"id": range(100_000), "text": [f"row {n}" for n in range(100_000)]})
    with (
        store.write(ref, "application/vnd.apache.parquet") as file,
        pq.ParquetWriter(file, table.schema) as rows,
    ):
        for batch in table.to_batches(max_chunksize=10_000):
            rows.write_batch(batch)
    with store.open(ref) as file:
        parquet = pq.ParquetFile(file)
        assert parquet.num_row_groups == 10
        assert parquet.read_row_group(7, ["id"]).column("id")[0].as_py() == 70_000
        assert sum(batch.num_rows for batch in parquet.iter_batches(1000)) == 100_000


def test_gzip_and_text_go_over_it(store: ObjectStore, ref: ObjectRef) -> None:
    with store.write(ref, "application/gzip") as file, gzip.open(file, "wt") as text:
        text.write("Äpfel\nBirnen\n")
    with store.open(ref) as file, gzip.open(file, "rt") as text:
        assert list(text) == ["Äpfel\n", "Birnen\n"]


# --- whole or not at all -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, len(TEXT)])
def test_nothing_appears_before_the_end_nor_after_an_error(
    store: ObjectStore, ref: ObjectRef, size: int
) -> None:
    def seen_from_outside() -> None:
        with pytest.raises(ObjectNotFound):
            store.stat(ref)
        assert keys(store, ref.bucket) == ["another"]

    with pytest.raises(ZeroDivisionError):
        write_and_fail(store, ref, TEXT[:size], seen_from_outside)
    gc.collect()
    seen_from_outside()


@pytest.mark.parametrize("size", [10, len(TEXT)])
def test_after_an_error_the_earlier_object_is_still_there(
    store: ObjectStore, ref: ObjectRef, size: int
) -> None:
    write(store, ref, b"the earlier one")
    with pytest.raises(ZeroDivisionError):
        write_and_fail(store, ref, TEXT[:size])
    assert fetched(store, ref).data == b"the earlier one"


@pytest.mark.parametrize("size", [10, len(TEXT)])
def test_a_writer_that_is_forgotten_leaves_nothing(
    store: ObjectStore, ref: ObjectRef, size: int
) -> None:
    writing = store.write(ref, "text/plain")
    writing.__enter__().write(TEXT[:size])
    del writing
    gc.collect()
    assert keys(store, ref.bucket) == ["another"]


def test_a_file_closed_inside_the_block_appears_at_its_end_all_the_same(
    store: ObjectStore, ref: ObjectRef
) -> None:
    for size in (10, len(TEXT)):
        with store.write(ref, "text/plain") as file:
            file.write(TEXT[:size])
            file.close()
            with pytest.raises(ValueError, match="closed"):
                file.write(b"more")
        assert store.stat(ref).size == size


def test_an_aborted_upload_leaves_no_parts(
    s3: S3Endpoint, s3_store: ObjectStore, bucket: str
) -> None:
    def unfinished() -> int:
        return len(s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []))

    at_work: list[int] = []
    with pytest.raises(ZeroDivisionError):
        write_and_fail(s3_store, ObjectRef(bucket, "a"), TEXT, lambda: at_work.append(unfinished()))
    assert at_work == [1]
    assert unfinished() == 0


def test_a_failed_write_leaves_no_file(tmp_path: Path, folder_store: ObjectStore) -> None:
    with pytest.raises(ZeroDivisionError):
        write_and_fail(folder_store, parse_uri("s3://files/a"), TEXT)
    assert [path for path in (tmp_path / "a folder").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("size", [10, len(TEXT)])
def test_the_first_file_makes_the_upload_bucket(
    s3: S3Endpoint, s3_store: ObjectStore, size: int
) -> None:
    ref = ObjectRef(s3_store._upload_bucket, "ann/files/1")  # type: ignore[attr-defined]
    write(s3_store, ref, TEXT[:size])
    assert s3_store.stat(ref).size == size
    found = s3.client().head_object(Bucket=ref.bucket, Key=ref.key)
    assert found["ContentType"] == "application/jsonl"


# --- versions ----------------------------------------------------------------------------------


def test_an_object_is_opened_only_as_the_version_that_is_asked_for(
    store: ObjectStore, ref: ObjectRef
) -> None:
    write(store, ref, b"one")
    etag = store.stat(ref).etag
    with store.open(ref, if_match=etag) as file:
        assert file.read() == b"one"
    write(store, ref, b"two")
    assert store.stat(ref).etag != etag
    with pytest.raises(ObjectChanged, match=str(ref)):
        store.open(ref, if_match=etag)


def test_two_versions_of_an_object_never_mix(store: ObjectStore, ref: ObjectRef) -> None:
    write(store, ref, TEXT)
    with store.open(ref) as file:
        assert file.read(10) == TEXT[:10]
        write(store, ref, TEXT.upper())
        try:
            rest = file.read()
        except ObjectChanged:
            rest = TEXT[10:]
        assert rest == TEXT[10:]


@pytest.mark.parametrize("read", [lambda file: file.read(), list])
def test_a_file_that_is_cut_off_in_place_does_not_end_as_if_it_were_whole(
    tmp_path: Path, folder_store: ObjectStore, read: Callable[[BinaryIO], object]
) -> None:
    ref = parse_uri("s3://files/a")
    write(folder_store, ref, TEXT)
    with folder_store.open(ref) as file:
        file.read(10)
        with open(tmp_path / "a folder" / "files" / "a", "r+b") as cut:
            cut.truncate(3 * MB)
        with pytest.raises(ObjectChanged):
            read(file)


# --- what is missing ---------------------------------------------------------------------------


def test_what_is_missing_is_not_found(store: ObjectStore, ref: ObjectRef) -> None:
    nowhere = parse_uri("s3://no-such-bucket/a")
    for missing in (ref, nowhere, ObjectRef(ref.bucket, "another", "no-such-version")):
        with pytest.raises(ObjectNotFound, match="s3://"):
            store.open(missing)
        with pytest.raises(ObjectNotFound, match="s3://"):
            store.stat(missing)
    store.delete(ref)
    store.delete(nowhere)
    with pytest.raises(ObjectNotFound, match="no-such-bucket"):
        keys(store, "no-such-bucket")
    assert keys(store, ref.bucket) == ["another"]


def test_what_was_deleted_is_gone(store: ObjectStore, ref: ObjectRef) -> None:
    write(store, ref, b"x")
    for _ in range(2):
        store.delete(ref)
        assert keys(store, ref.bucket) == ["another"]
        with pytest.raises(ObjectNotFound):
            store.open(ref)


# --- listing -----------------------------------------------------------------------------------

NAMES = [
    *("a", "a-b/x", "a.txt", "a0/x", "b/c/d", "b/c/e", "b/c!/d", "b/c-", "b/c0", "b/c/", "c//d"),
    *("photos/10.png", "photos/9.png", "photos/Äpfel.png", "photos/🍐.png", "photos/\uffee.png"),
    *("why?x=1&y#z", "100%.png", "z z/+", "back\\slash"),
]
IN_ORDER = sorted(NAMES, key=str.encode)


@pytest.fixture
def listed(store: ObjectStore, bucket: str) -> str:
    for name in NAMES:
        store.put(ObjectRef(bucket, name), name.encode(), "text/plain")
    return bucket


def test_a_listing_is_in_the_order_of_the_bytes_with_sizes(store: ObjectStore, listed: str) -> None:
    found = list(store.list(listed, ""))
    assert [each.key for each in found] == IN_ORDER
    assert all(each.size == len(each.key.encode()) for each in found)


def test_a_listing_holds_what_begins_with_the_prefix(store: ObjectStore, listed: str) -> None:
    for prefix in (
        "a",
        "b/",
        "b/c",
        "b/c/",
        "c//",
        "photos/",
        "photos/9",
        "photos/Ä",
        "photo",
        "x",
    ):
        expected = [name for name in IN_ORDER if name.startswith(prefix)]
        assert keys(store, listed, prefix) == expected, prefix


def test_a_listing_goes_on_after_any_key(store: ObjectStore, listed: str) -> None:
    for after in [*NAMES, "b", "b/", "b/c/d/e", "b/d", "photos", "photos/", "a-", "zzz", "~"]:
        expected = [name for name in IN_ORDER if name.encode() > after.encode()]
        assert keys(store, listed, after=after) == expected, after
        below = [name for name in expected if name.startswith("b/c")]
        assert keys(store, listed, "b/c", after) == below, after


def test_a_listing_of_many_pages_is_whole(
    store: ObjectStore, listed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visq.objects.s3._PAGE_KEYS", 3)
    assert keys(store, listed) == IN_ORDER
    assert (
        keys(store, listed, "photos/", "photos/9") == IN_ORDER[IN_ORDER.index("photos/9.png") :][:4]
    )


def test_what_names_no_bucket_is_not_listed(store: ObjectStore) -> None:
    for bucket, prefix in (("..", ""), ("", ""), (".incoming", ""), ("files", "\ud800")):
        with pytest.raises(InvalidRequest):
            keys(store, bucket, prefix)
