"""Parquet files that are no files of items, or broken, or cannot be read at all."""

from __future__ import annotations

import io
import random
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.visq.batch_files.test_parquet import MIB, many, parquet, read
from visq.batch_files.lines import Line
from visq.batch_files.parquet import parquet_lines
from visq.errors import BatchInputError, Unavailable

WHOLE = parquet(many(200), row_group_size=70)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes"),
        (b'{"custom_id": "a", "prompt": "hello"}\n' * 100, "magic bytes not found"),
        (WHOLE[:-1], "magic bytes not found"),
        (WHOLE[: len(WHOLE) // 2], "magic bytes not found"),
        (WHOLE[len(WHOLE) // 2 :], "the file"),
        (b"PAR1" + b"x" * 100 + b"PAR1", "cannot be read as Parquet"),
        (b"PAR1" + b"x" * 100 + b"PARE", "cannot be read as Parquet"),
        (parquet({"prompt": ["x"]}), "there is no column `custom_id`"),
        (parquet(pa.table({})), "there is no column `custom_id`"),
        (parquet({"custom_id": [1, 2]}), "`custom_id` must be text, and is int64"),
        (parquet({"custom_id": [["a"]]}), "`custom_id` must be text, and is list"),
        (parquet({"custom_id": [None]}), "`custom_id` must be text, and is null"),
        (parquet({"custom_id": ["a"], "promt": ["x"]}), "`promt` is no field of an item"),
        (
            parquet(pa.table([["a"], ["x"], ["y"]], ["custom_id", "prompt", "prompt"])),
            "2 columns `prompt`",
        ),
    ],
    ids=[
        "empty",
        "text",
        "the last byte",
        "cut off",
        "no beginning",
        "no footer",
        "encrypted",
        "no custom_id",
        "no columns",
        "numbers",
        "lists",
        "nulls",
        "misspelt",
        "twice",
    ],
)
def test_what_is_no_file_of_items_is_refused_as_a_whole(data: bytes, said: str) -> None:
    with pytest.raises(BatchInputError, match=said):
        read(data)


@pytest.mark.parametrize("checksums", [True, False])
def test_rows_before_the_broken_place_are_read(checksums: bool) -> None:
    options = {"compression": "none" if checksums else "zstd", "write_page_checksum": checksums}
    broken = bytearray(parquet(many(200), row_group_size=70, **options))
    footer = pq.ParquetFile(io.BytesIO(broken)).metadata
    page = footer.row_group(1).column(1)
    end = page.data_page_offset + page.total_compressed_size - 100
    broken[end] ^= 255
    found: list[Line] = []
    with pytest.raises(BatchInputError, match="the file is broken after row 70: "):
        found.extend(parquet_lines(io.BytesIO(broken), max_bytes=MIB))
    assert found == read(WHOLE)[:70]


def test_nothing_but_an_input_error_comes_of_a_damaged_file() -> None:
    chance = random.Random(1)
    ends = {"read": 0, "refused": 0}
    for _ in range(300):
        damaged = bytearray(WHOLE)
        for _ in range(chance.choice([1, 2, 8])):
            # Most of what can go wrong is in the footer.
            place = len(damaged) - 1 - min(int(chance.expovariate(1 / 800)), len(damaged) - 1)
            damaged[place] = chance.randrange(256)
        try:
            count = len(read(bytes(damaged)))
        except BatchInputError:
            ends["refused"] += 1
        else:
            assert count == 200
            ends["read"] += 1
    assert all(ends.values())


class Failing(io.BytesIO):
    """An object whose store is gone when the data is read."""

    def __init__(self, data: bytes, error: Exception) -> None:
        super().__init__(data)
        self._error = error

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() < 1000:
            raise self._error
        return super().read(size)


@pytest.mark.parametrize("error", [Unavailable("the store is gone"), OSError(5, "I/O error")])
def test_errors_of_the_file_itself_are_not_taken_for_broken_parquet(error: Exception) -> None:
    file = Failing(WHOLE, error)
    with pytest.raises(type(error)) as caught:
        list(parquet_lines(file, max_bytes=MIB))
    assert caught.value is error


def test_without_pyarrow_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "visq.batch_files.parquet")
    with pytest.raises(BatchInputError, match=r"install visq\[parquet\]"):
        __import__("visq.batch_files.parquet")
