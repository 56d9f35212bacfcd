"""Items read from Parquet files: a row is the JSON line that says the same.

Needs pyarrow, which is an optional part of visq: import this module where such a file is at hand.

:raises BatchInputError: (when imported) pyarrow is not installed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from typing import Any, BinaryIO, Final
from uuid import UUID

from visq.batch_files.items import RequestLine
from visq.batch_files.lines import Line
from visq.errors import BatchInputError, VisqError
from visq.types import BatchItem
from visq.validation import strict_json

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise BatchInputError(
        "Parquet needs pyarrow, which is not installed where this file is read: install "
        "visq[parquet] there, or use JSON lines"
    ) from None

from visq.batch_files.parquet_results import ParquetResults

__all__ = ["ParquetResults", "parquet_lines"]

FIELDS: Final = BatchItem.model_fields.keys() | RequestLine.model_fields.keys()

_JSON_FIELDS: Final = {"body", "gen_config", "images", "messages", "metadata", "session"}

_INDEX: Final = re.compile(r"__index_level_\d+__")
"""Columns that pandas adds of itself."""

_READ_BYTES: Final = 1024 * 1024
"""Of a column at a time: a row group may be as large as the file."""
_ROWS: Final = 64
"""Most rows that are decoded at a time: one may have some MB."""
_ROWS_BYTES: Final = 4 * 1024 * 1024
"""About as many bytes of rows are decoded at a time."""


def parquet_lines(file: BinaryIO, *, max_bytes: int, number: int = 0) -> Iterator[Line]:
    """The rows of `file` after the first `number`.

    The columns are the fields of an item, or of a line of OpenAI's batch files. What is null is
    left out, in structs too. ``body``, ``gen_config``, ``images``, ``messages``, ``metadata`` and
    ``session`` are structs, lists and maps, or text that holds JSON; ``images`` may also be the
    name of one image. Binary is text in UTF-8, dates and times become ISO 8601, decimals become
    numbers. A row that has no JSON is a `Line.fault`. Row groups before the place are not read; in
    memory are one page of each column and some rows.

    :param file: seekable; it stays open.
    :param max_bytes: of a row as JSON; a longer one has no `Line.data`.
    :returns: lines whose `Line.offset` is their number.
    :raises BatchInputError: it is no Parquet file, or broken, or its columns are not those of
        items.
    """
    with _reading("the file cannot be read as Parquet"):
        source = pq.ParquetFile(
            file, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True
        )
        columns = _columns(source.schema_arrow)
        groups = [source.metadata.row_group(each) for each in range(source.num_row_groups)]
    end = 0
    for index, group in enumerate(groups):
        position, end = end, end + group.num_rows
        if end <= number:
            continue
        average = group.total_byte_size // max(group.num_rows, 1)
        size = max(1, min(_ROWS, _ROWS_BYTES // max(average, 1)))
        for rows in _batches(source, index, columns, size, position):
            fields = [*zip(rows.schema.names, rows.columns, strict=True)]
            for row in range(max(0, number - position), rows.num_rows):
                yield _line(fields, row, position + row + 1, max_bytes)
            position += rows.num_rows
        if position != end:
            raise BatchInputError(f"the file is broken: it has {position} rows instead of {end}")


def _columns(schema: Any) -> list[str]:
    """Those that are read.

    :raises BatchInputError: they are not those of items.
    """
    names = [name for name in schema.names if not _INDEX.fullmatch(name)]
    known = ", ".join(f"`{name}`" for name in sorted(FIELDS))
    if alien := [name for name in names if name not in FIELDS]:
        raise BatchInputError(
            f"the column {_shown(alien[0])} is no field of an item; these are: {known}"
        )
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise BatchInputError(f"there are {times} columns `{name}`")
    if "custom_id" not in names:
        raise BatchInputError(f"there is no column `custom_id`; the fields of an item are: {known}")
    kind = schema.field("custom_id").type
    if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise BatchInputError(f"the column `custom_id` must be text, and is {kind}")
    return names


def _is_text(kind: Any) -> bool:
    types = pa.types
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    )


def _batches(
    source: Any, group: int, columns: list[str], size: int, position: int
) -> Iterator[Any]:
    """The rows of one row group, some at a time."""
    with _reading(f"the file is broken after row {position}"):
        batches = source.iter_batches(size, [group], columns, use_threads=False)
    while True:
        with _reading(f"the file is broken after row {position}"):
            rows = next(batches, None)
            if rows is not None:
                rows.validate()
        if rows is None:
            return
        position += rows.num_rows
        yield rows


class _Unsayable(Exception):  # noqa: N818
    """A value has no form in JSON; says why."""


def _line(fields: list[tuple[str, Any]], row: int, number: int, max_bytes: int) -> Line:
    item: dict[str, Any] = {}
    try:
        for name, column in fields:
            scalar = column[row]
            if isinstance(scalar, pa.BinaryScalar) and len(scalar.as_buffer() or b"") > max_bytes:
                return Line(number, number, None)
            if (value := _value(name, scalar)) is not None:
                item[name] = value
        data = json.dumps(item, ensure_ascii=False).encode()
    except _Unsayable as error:
        return _faulty(number, item, str(error))
    except RecursionError:
        return _faulty(number, item, "it is nested too deeply")
    return Line(number, number, None if len(data) > max_bytes else data)


def _faulty(number: int, item: dict[str, Any], fault: str) -> Line:
    whose = {name: item[name] for name in ("custom_id",) if name in item}
    return Line(number, number, json.dumps(whose).encode(), fault)


def _value(name: str, scalar: Any) -> object:
    """:raises _Unsayable: it has no form in JSON."""
    try:
        value = _plain(scalar.as_py(maps_as_pydicts="strict"))
        if name not in _JSON_FIELDS or not isinstance(value, str):
            return value
        if name == "images" and not value.lstrip().startswith("["):
            return [value]
        return strict_json(value.encode(), "it")
    except (_Unsayable, VisqError) as error:
        raise _Unsayable(f"{name}: {error}") from None
    except (ArithmeticError, KeyError, ValueError, pa.ArrowException) as error:
        raise _Unsayable(f"{name}: the value cannot be read: {_said(error)}") from None


def _plain(value: object) -> object:
    """A value of Arrow's as JSON has it."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if not math.isfinite(value):
                raise _Unsayable("not a finite number")
            return value
        case Decimal():
            return _plain(int(value) if value == value.to_integral_value() else float(value))
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise _Unsayable("bytes that are no text in UTF-8") from None
        case date() | time():
            return value.isoformat()
        case UUID():
            return str(value)
        case dict():
            return {_key(key): _plain(each) for key, each in value.items() if each is not None}
        case list():
            return [_plain(each) for each in value]
    raise _Unsayable(f"a value of the type {type(value).__name__} has no form in JSON")


def _key(value: object) -> str:
    key = _plain(value)
    if not isinstance(key, str):
        raise _Unsayable("a map whose keys are no text")
    return key


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """:raises BatchInputError: pyarrow cannot read it. Errors of the file itself pass."""
    try:
        yield
    except VisqError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, pa.ArrowException) as error:
        raise BatchInputError(f"{what}: {_said(error)}") from error
    except OSError as error:
        if error.errno is not None:  # the disk's; Parquet's have no number
            raise
        raise BatchInputError(f"{what}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """The beginning of what pyarrow says: it may quote the file."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]


def _shown(name: str) -> str:
    return f"`{name[:100]}`"
