"""Files of batches where they lie: in a real S3 endpoint and in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq
import pytest

from tests.servers import S3Endpoint
from tests.visq.batch_files.test_parquet import many, noise, parquet
from tests.visq.batch_files.test_parquet_results import answer, job
from tests.visq.objects.reading import s3_settings
from visq.batch_files.items import item_of
from visq.batch_files.lines import Line, lines
from visq.batch_files.parquet import parquet_lines
from visq.batch_files.results import native_line, open_writer
from visq.errors import ObjectChanged
from visq.objects import ObjectRef, ObjectStore, open_store
from visq.settings import Settings
from visq.types import JobStatus

MIB = 1024 * 1024


@pytest.fixture(params=["s3", "folder"])
def store(request: pytest.FixtureRequest, s3: S3Endpoint, tmp_path: Path) -> Iterator[ObjectStore]:
    in_folder = Settings(object_store=(tmp_path / "a folder").as_uri())
    found = open_store(s3_settings(s3) if request.param == "s3" else in_folder)
    yield found
    found.close()


def read(file: BinaryIO, ref: ObjectRef, after: Line | None = None) -> Iterator[Line]:
    number, offset = (after.number, after.offset) if after else (0, 0)
    if ref.key.endswith(".parquet"):
        return parquet_lines(file, max_bytes=MIB, number=number)
    return lines(file, max_bytes=MIB, number=number, offset=offset)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_results_are_written_and_read_again(store: ObjectStore, bucket: str, ending: str) -> None:
    ref = ObjectRef(bucket, f"out/results.{ending}")
    jobs = [job(n, JobStatus.SUCCEEDED, result=answer(f"it is {n}")) for n in range(1000)]
    with store.write(ref, "application/octet-stream") as file:
        writer = open_writer(file, ref.key, native_line)
        writer.write(jobs[:300])
        writer.write(jobs[300:])
        writer.close()
    with store.open(ref) as file:
        if ending == "parquet":
            found = pq.ParquetFile(file).read(["custom_id"]).column(0).to_pylist()
        else:
            found = [json.loads(line.data or b"")["custom_id"] for line in read(file, ref)]
    assert found == [each.custom_id for each in jobs]


def test_parquet_items_are_read_and_read_on(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "in/items.parquet")
    with store.write(ref, "application/octet-stream") as file:
        file.write(parquet(many(1000), row_group_size=300))
    with store.open(ref) as file:
        whole = [*read(file, ref)]
    assert [item_of(line).custom_id for line in whole] == [f"row {n}" for n in range(1000)]
    with store.open(ref) as file:
        assert [*read(file, ref, after=whole[700])] == whole[701:]


def test_a_file_that_is_replaced_meanwhile_is_not_called_broken(
    store: ObjectStore, bucket: str
) -> None:
    ref = ObjectRef(bucket, "in/items.parquet")
    columns = {"custom_id": [f"{n}" for n in range(20_000)], "prompt": noise(20_000, 1000)}
    with store.write(ref, "application/octet-stream") as file:
        file.write(parquet(columns, row_group_size=2000))
    with store.open(ref) as file:
        found = read(file, ref)
        assert next(found).number == 1
        store.put(ref, b"another", "text/plain")
        with suppress(ObjectChanged):  # a folder's files stay what they were
            assert sum(1 for _ in found) == 19_999


def test_a_parquet_output_that_fails_does_not_appear(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "out/results.parquet")
    store.put(ObjectRef(bucket, "another"), b"1", "text/plain")
    with pytest.raises(ZeroDivisionError):
        write_and_fail(store, ref)
    assert [each.key for each in store.list(bucket, "")] == ["another"]


def write_and_fail(store: ObjectStore, ref: ObjectRef) -> None:
    with store.write(ref, "text/plain") as file:
        open_writer(file, ref.key, native_line).write([job(n) for n in range(6000)])
        _ = 1 / 0
