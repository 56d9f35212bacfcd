"""Results written to a Parquet file. Import this with `visq.batch_files.parquet`."""

from __future__ import annotations

from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from visq.types import JobView

ROWS: Final = 5000
"""Most rows of a row group."""
ROWS_BYTES: Final = 16 * 1024 * 1024
"""About as many bytes of texts are in memory, and in a row group."""

SCHEMA: Final = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("custom_id", pa.string()),
        pa.field("position", pa.int64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("completion_tokens", pa.int64()),
        pa.field("cached_tokens", pa.int64()),
        pa.field("images", pa.int64()),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("error_param", pa.string()),
        pa.field("session_id", pa.string()),
        pa.field("turn", pa.int64()),
        pa.field("result", pa.string()),
    ]
)


class ParquetResults:
    """Writes one row for each item, in row groups of some thousands; never closes the file.

    ``text`` to ``images`` are null for an item that has no result, ``error_*`` for one that has no
    error. ``text`` and ``finish_reason`` are those of the first choice; ``result`` is the whole
    result as JSON text: all choices, logprobs, the model. The other columns are those of the JSON
    lines (`visq.batch_files.results.native_line`).
    """

    def __init__(self, file: BinaryIO) -> None:
        self._sink = _Sink(file)
        self._writer = pq.ParquetWriter(self._sink, SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._size = 0

    def write(self, jobs: list[JobView]) -> None:
        for job in jobs:
            row = _row(job)
            self._rows.append(row)
            self._size += sum(len(each) for each in row.values() if isinstance(each, str))
            if len(self._rows) == ROWS or self._size > ROWS_BYTES:
                self._write_group()

    def close(self) -> None:
        if self._rows:
            self._write_group()
        self._writer.close()

    def __del__(self) -> None:
        # pyarrow ends files whose writers are only forgotten, because something failed.
        self._sink.is_open = False

    def _write_group(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._rows = []
        self._size = 0


class _Sink:
    """The part of a file that pyarrow needs."""

    closed: Final = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.is_open = True

    def write(self, data: bytes) -> int:
        return self._file.write(data) if self.is_open else len(data)


def _row(job: JobView) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": job.id,
        "custom_id": job.custom_id,
        "position": job.position,
        "status": job.status.value,
        "session_id": job.session_id,
        "turn": job.turn,
    }
    if job.result is not None:
        usage = job.result.usage
        row |= {
            "text": job.result.text,
            "finish_reason": job.result.finish_reason,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "images": usage.images,
            "result": job.result.model_dump_json(exclude_none=True),
        }
    if job.error is not None:
        row |= {
            "error_code": job.error.code,
            "error_message": job.error.message,
            "error_param": job.error.param,
        }
    return row
