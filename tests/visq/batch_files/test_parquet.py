"""Rows of Parquet files as items: all forms of columns, places to go on from, broken files."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visq.batch_files.items import ItemError, item_of
from visq.batch_files.lines import Line
from visq.batch_files.parquet import parquet_lines
from visq.errors import InvalidRequest, LineTooLong
from visq.types import BatchItem, ImagePart, NewSession

MIB = 1024 * 1024

Columns = dict[str, Any]


def parquet(columns: Columns | pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file, **options)
    return file.getvalue()


def read(data: bytes, max_bytes: int = MIB, number: int = 0) -> list[Line]:
    return [*parquet_lines(io.BytesIO(data), max_bytes=max_bytes, number=number)]


def only(column: str, values: Any) -> Line:
    """The line of a row with this column."""
    columns = {"custom_id": ["a"], "prompt": ["hello"]} | {column: values}
    if column in ("messages", "body"):
        del columns["prompt"]
    (line,) = read(parquet(columns))
    return line


def item_with(column: str, values: Any) -> BatchItem:
    return item_of(only(column, values))


def fault_of(column: str, values: Any) -> str:
    with pytest.raises(ItemError) as caught:
        item_of(only(column, values))
    assert caught.value.custom_id == "a"
    assert isinstance(caught.value.error, InvalidRequest)
    return caught.value.error.message


def many(count: int) -> Columns:
    return {
        "custom_id": [f"row {index}" for index in range(count)],
        "prompt": [f"what is {index}?" for index in range(count)],
        "images": [[f"s3://bucket/{index}.png"] * (index % 3) for index in range(count)],
    }


def test_rows_are_items() -> None:
    found = read(parquet(many(200), row_group_size=70))
    assert [(line.number, line.offset) for line in found] == [(n, n) for n in range(1, 201)]
    assert [item_of(line) for line in found] == [
        BatchItem(custom_id=custom_id, prompt=prompt, images=images)
        for custom_id, prompt, images in zip(*many(200).values(), strict=True)
    ]


def test_what_is_null_is_not_said() -> None:
    columns = {
        "custom_id": ["a", "b"],
        "prompt": ["hello", "hello"],
        "images": pa.array([None, ["s3://bucket/b.png"]]),
        "gen_config": pa.array([{"n": 2, "top_p": None}, None]),
        "after": pa.nulls(2, pa.string()),
        "session_id": pa.nulls(2),
    }
    first, second = [item_of(line) for line in read(parquet(columns))]
    assert first.model_fields_set == {"custom_id", "prompt", "gen_config"}
    assert first.gen_config.model_fields_set == {"n"}
    assert second.model_fields_set == {"custom_id", "prompt", "images"}


PARTS = [
    {"type": "text", "text": "what is this?"},
    {"type": "image_url", "image_url": {"url": "s3://bucket/a.png"}},
]


@pytest.mark.parametrize(
    "messages",
    [[[{"role": "user", "content": PARTS}]], [json.dumps([{"role": "user", "content": PARTS}])]],
    ids=["structs", "JSON"],
)
def test_messages_are_structs_or_json(messages: Any) -> None:
    (message,) = item_with("messages", messages).messages or []
    text, image = message.parts()
    assert (text.type, image.type) == ("text", "image_url")
    assert isinstance(image, ImagePart)
    assert image.image_url.url == "s3://bucket/a.png"


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("images", "s3://bucket/a, b [1].png", ["s3://bucket/a, b [1].png"]),
        ("images", '["s3://bucket/a", "s3://bucket/b"]', ["s3://bucket/a", "s3://bucket/b"]),
        ("images", "[]", []),
        ("images", pa.scalar([]), []),
        ("metadata", '{"k": "v"}', {"k": "v"}),
        ("metadata", {"k": "v", "absent": None}, {"k": "v"}),
        ("metadata", pa.scalar([("k", "v")], pa.map_(pa.string(), pa.string())), {"k": "v"}),
        ("metadata", pa.scalar([(b"k", b"v")], pa.map_(pa.binary(), pa.binary())), {"k": "v"}),
        ("metadata", {"on": date(2026, 11, 25)}, {"on": "2026-11-25"}),
        (
            "metadata",
            {"at": datetime(2026, 11, 25, 1, 2, 3, tzinfo=UTC)},
            {"at": "2026-11-25T01:02:03+00:00"},
        ),
        ("metadata", "null", {}),
        ("session", "{}", NewSession()),
        ("session", {"metadata": {"k": "v"}}, NewSession(metadata={"k": "v"})),
        ("prompt", b"caf\xc3\xa9", "café"),
        ("prompt", pa.scalar("x", pa.large_string()), "x"),
        ("prompt", "[1]", "[1]"),
        ("custom_id", b"a", "a"),
        ("custom_id", pa.scalar("a", pa.large_string()), "a"),
        ("custom_id", pa.array(["a"]).dictionary_encode(), "a"),
        ("do_preprocess", False, False),
    ],
)
def test_the_forms_of_a_column(column: str, value: Any, expected: object) -> None:
    if isinstance(value, pa.Scalar):
        value = pa.array([value.as_py()], value.type)
    elif not isinstance(value, pa.Array):
        value = [value]
    assert getattr(item_with(column, value), column) == expected


def test_numbers_of_a_gen_config() -> None:
    config = {"top_p": Decimal("0.5"), "n": Decimal("2"), "max_new_tokens": 7, "do_sample": True}
    found = item_with("gen_config", [config]).gen_config
    assert (found.top_p, found.n, found.max_new_tokens, found.do_sample) == (0.5, 2, 7, True)


def test_json_says_null_where_a_struct_cannot() -> None:
    config = item_with("gen_config", ['{"max_new_tokens": null}']).gen_config
    assert config.max_new_tokens is None


def test_lines_of_openai() -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    columns = {
        "custom_id": ["a", "b"],
        "method": ["POST", "POST"],
        "url": ["/v1/chat/completions"] * 2,
    }
    structs = read(parquet(columns | {"body": [body, body]}))
    texts = read(parquet(columns | {"body": [json.dumps(body), json.dumps(body)]}))
    items = [item_of(line, models=["small"]) for line in structs]
    assert items == [item_of(line) for line in texts]
    assert [item.custom_id for item in items] == ["a", "b"]
    assert items[0].gen_config.max_new_tokens == 5


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("messages", "hello", "messages: it is not JSON: Expecting value at line 1, column 1"),
        ("metadata", "", "metadata: it is not JSON"),
        ("metadata", '{"k": "\\u0000"}', "metadata: text cannot hold the character U+0000"),
        ("images", "[s3://bucket/a]", "images: it is not JSON"),
        ("gen_config", {"top_p": float("nan")}, "gen_config: not a finite number"),
        ("gen_config", "[" * 900 + "]" * 900, "recursion limit exceeded"),
        ("gen_config", "[" * 100_000, "gen_config: it is nested too deeply"),
        ("metadata", {"k": b"\xff"}, "metadata: bytes that are no text in UTF-8"),
        ("metadata", {"k": timedelta(1)}, "metadata: a value of the type timedelta"),
        ("metadata", {"k": 5}, "metadata.k: input should be a valid string"),
        ("metadata", pa.array([[(1, "v")]], pa.map_(pa.int64(), pa.string())), "keys are no text"),
        (
            "metadata",
            pa.array([[("k", "v"), ("k", "w")]], pa.map_(pa.string(), pa.string())),
            "metadata: the value cannot be read",
        ),
        ("images", [None], "images.0: input should be a valid string"),
        ("prompt", 5, "prompt: input should be a valid string"),
        ("do_preprocess", "yes", "do_preprocess: input should be a valid boolean"),
        ("body", {"model": "small"}, "body.messages: field required"),
    ],
)
def test_what_is_no_item_is_an_error_of_the_row(column: str, value: Any, said: str) -> None:
    message = fault_of(column, value if isinstance(value, pa.Array) else [value])
    assert message.startswith("line 1: ")
    assert said in message


def test_text_that_is_not_utf_8_is_an_error_of_its_row() -> None:
    broken = pa.array([b"caf\xe9", b"tea"]).view(pa.string())
    first, second = read(parquet({"custom_id": ["a", "b"], "prompt": broken}))
    assert "codec can't decode" in (first.fault or "")
    assert item_of(second).prompt == "tea"


def test_a_row_without_custom_id_is_an_error_of_the_row() -> None:
    first, second = read(parquet({"custom_id": [None, "b"], "prompt": ["x", "y"]}))
    with pytest.raises(ItemError, match="line 1: custom_id: field required"):
        item_of(first)
    assert item_of(second).custom_id == "b"


@pytest.mark.parametrize("column", ["prompt", "images"])
def test_a_row_that_is_too_long_has_no_data_and_the_next_one_is_read(column: str) -> None:
    long: Any = "x" * 1000 if column == "prompt" else ["x" * 100] * 10
    columns = many(3) | {column: [many(3)[column][0], long, many(3)[column][2]]}
    first, second, third = read(parquet(columns), max_bytes=900)
    assert second == Line(2, 2, None)
    with pytest.raises(ItemError) as caught:
        item_of(second)
    assert type(caught.value.error) is LineTooLong
    assert [item_of(line).custom_id for line in (first, third)] == ["row 0", "row 2"]


@pytest.mark.parametrize("number", [0, 1, 69, 70, 71, 140, 199, 200, 500])
def test_reading_goes_on_after_any_row(number: int) -> None:
    data = parquet(many(200), row_group_size=70)
    assert read(data, number=number) == read(data)[number:]


class Watched(io.BytesIO):
    """Counts what is read."""

    total = 0
    largest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.total += len(data)
        self.largest = max(self.largest, len(data))
        return data


def noise(count: int, size: int) -> list[str]:
    """Texts that are not packed well."""
    chance = random.Random(1)
    pool = f"{chance.getrandbits(4_000_000):x}"
    return [pool[start : start + size] for start in chance.choices(range(990_000), k=count)]


def test_row_groups_before_the_place_are_not_read() -> None:
    columns = {"custom_id": [f"{n}" for n in range(2000)], "prompt": noise(2000, 1000)}
    file = Watched(parquet(columns, row_group_size=200))
    found = [*parquet_lines(file, max_bytes=MIB, number=1900)]
    assert [line.number for line in found] == [*range(1901, 2001)]
    assert file.total < len(file.getvalue()) / 4


@contextmanager
def memory_counted() -> Iterator[pa.MemoryPool]:
    """pyarrow's memory in the block."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(usual)


def test_a_row_group_as_large_as_the_file_is_not_read_into_memory() -> None:
    columns = {"custom_id": [f"{n}" for n in range(100_000)], "prompt": noise(100_000, 500)}
    file = Watched(parquet(columns, row_group_size=100_000))
    with memory_counted() as pool:
        count = sum(1 for _ in parquet_lines(file, max_bytes=MIB))
    assert count == 100_000
    assert len(file.getvalue()) > 30 * MIB
    assert pool.max_memory() < 8 * MIB
    assert file.largest <= 2 * MIB


def test_large_rows_are_decoded_a_few_at_a_time() -> None:
    columns = {"custom_id": [f"{n}" for n in range(64)], "prompt": noise(64, 900_000)}
    # pyarrow reads whole pages, so pages must be small for this.
    file = io.BytesIO(parquet(columns, use_dictionary=False, write_batch_size=1))
    with memory_counted() as pool:
        count = sum(1 for _ in parquet_lines(file, max_bytes=MIB))
    assert count == 64
    assert len(file.getvalue()) > 30 * MIB
    assert pool.max_memory() < 20 * MIB


def test_a_file_without_rows_has_no_lines() -> None:
    assert read(parquet(pa.table({"custom_id": pa.array([], pa.string())}))) == []


def test_columns_that_pandas_adds_are_ignored() -> None:
    (line,) = read(parquet({"custom_id": ["a"], "prompt": ["x"], "__index_level_0__": [7]}))
    assert line.data == b'{"custom_id": "a", "prompt": "x"}'


def test_the_file_stays_open() -> None:
    file = io.BytesIO(parquet(many(200)))
    for _ in parquet_lines(file, max_bytes=MIB):
        break
    assert not file.closed
