"""Results as lines of a file: in visq's form, or OpenAI's."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import BinaryIO, Final, Protocol, cast

from visq.openai.answers import batch_line
from visq.types import BatchView, JobStatus, JobView, Json

_PACKING_LEVEL: Final = 6


class ResultWriter(Protocol):
    """Writes the items that it is given, in that order."""

    def write(self, jobs: list[JobView]) -> None: ...

    def close(self) -> None:
        """Write what is still to be written. The file stays open."""
        ...


class JsonLines:
    """One line for each item."""

    def __init__(self, file: BinaryIO, line: Callable[[JobView], Json], *, packed: bool) -> None:
        self._stack = ExitStack()
        self._file = file
        if packed:
            # Without a time in it: the same results are the same bytes.
            zipped = gzip.GzipFile(
                filename="", mode="wb", fileobj=file, compresslevel=_PACKING_LEVEL, mtime=0
            )
            self._file = cast("BinaryIO", self._stack.enter_context(zipped))
        self._line = line
        self.size = 0
        """Bytes that were written, before they are packed."""

    def write(self, jobs: list[JobView]) -> None:
        lines = [json.dumps(self._line(job), ensure_ascii=False) + "\n" for job in jobs]
        self.size += self._file.write("".join(lines).encode())

    def close(self) -> None:
        self._stack.close()


def native_line(job: JobView) -> Json:
    """An item with its result or its error."""
    said = job.model_dump(
        mode="json",
        include={"custom_id", "position", "status", "result", "error", "session_id", "turn"},
        exclude_none=True,
    )
    return {"id": job.id, **said}


def openai_line(job: JobView) -> Json:
    """An item as a line of OpenAI's output file or error file."""
    return batch_line(job, top_logprobs=_TOP)


_TOP: Final = 20
"""No more alternatives are in the result than were asked for."""


def is_success(job: JobView) -> bool:
    return job.status is JobStatus.SUCCEEDED


def open_writer(file: BinaryIO, name: str, line: Callable[[JobView], Json]) -> ResultWriter:
    """The writer for a file of this name; the caller closes it before the file."""
    if name.endswith(".parquet"):
        from visq.batch_files.parquet import ParquetResults

        return ParquetResults(file)
    return JsonLines(file, line, packed=name.endswith(".gz"))


def summary(batch: BatchView) -> bytes:
    """The batch, as its summary file holds it."""
    return json.dumps(batch.model_dump(mode="json"), indent=2).encode() + b"\n"
