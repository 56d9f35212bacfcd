"""The lines of a file of items, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

from visq.batch_files.lines import Line, lines


def lines_of(
    file: BinaryIO,
    name: str,
    *,
    max_bytes: int,
    number: int = 0,
    offset: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[Line]:
    """As `lines`; of a file whose name ends with ``.parquet``, its rows as lines.

    :raises BatchInputError: as `lines`; or the file is Parquet, which needs ``visq[parquet]``.
    """
    if name.endswith(".parquet"):
        from visq.batch_files.parquet import parquet_lines

        return parquet_lines(file, max_bytes=max_bytes, number=number)
    return lines(file, max_bytes=max_bytes, number=number, offset=offset, alive=alive)
