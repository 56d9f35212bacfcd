"""The output of a batch: its items in input order, those that did not succeed, and a summary.

It is written from its beginning each time: an object appears whole or not at all, so who takes over
from a writer that died begins again, and repeats nothing but the reading of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import BinaryIO, Final

from models import batches, reading
from models.database import Database
from models.tables import Batch, StoredFile
from models.views import batch_view, job_view
from visq.batch_files.names import output_names
from visq.batch_files.results import (
    JsonLines,
    is_success,
    native_line,
    open_writer,
    openai_line,
    summary,
)
from visq.ids import new_id
from visq.objects import ObjectRef, ObjectStore, parse_uri
from visq.references import file_ref
from visq.settings import Settings
from visq.types import JobView

PAGE: Final = 500
"""Items that are read from the database at a time."""

TYPE: Final = "application/octet-stream"


class BatchWriter:
    """Writes the outputs of batches."""

    def __init__(self, settings: Settings, database: Database, store: ObjectStore) -> None:
        self._settings = settings
        self._database = database
        self._store = store

    def write(
        self, batch: Batch, tenant: str, still_ours: Callable[[], None]
    ) -> tuple[StoredFile | None, StoredFile | None]:
        """Write the output, and say which files of the tenant it is (none, if it was to be
        elsewhere in the store).

        :param still_ours: called from time to time; raises if this is not to go on.
        :raises ObjectForbidden: the store refuses it.
        :raises Unavailable: the store did not take it.
        """
        if batch.output_uri is not None:
            self._write_native(batch, batch.output_uri, still_ours)
            return None, None
        return self._write_files(batch, tenant, still_ours)

    def _write_native(self, batch: Batch, uri: str, still_ours: Callable[[], None]) -> None:
        names = output_names(uri)
        with ExitStack() as stack:
            output = self._open(stack, parse_uri(names.output))
            errors = self._open(stack, parse_uri(names.errors))
            everything = open_writer(output, names.output, native_line)
            wrong = JsonLines(errors, native_line, packed=False)
            for jobs in self._pages(batch, still_ours):
                everything.write(jobs)
                wrong.write([job for job in jobs if not is_success(job)])
            everything.close()
            wrong.close()
        ended = batch_view(batch).model_copy(update={"status": batches.final_status(batch)})
        self._store.put(parse_uri(names.summary), summary(ended), "application/json")

    def _write_files(
        self, batch: Batch, tenant: str, still_ours: Callable[[], None]
    ) -> tuple[StoredFile | None, StoredFile | None]:
        output = _File(batch, batch.output_file_id, "output", tenant, self._settings)
        errors = _File(batch, batch.error_file_id, "errors", tenant, self._settings)
        with ExitStack() as stack:
            for jobs in self._pages(batch, still_ours):
                for file, belongs in ((output, True), (errors, False)):
                    mine = [job for job in jobs if is_success(job) is belongs]
                    if mine and file.writer is None:  # as OpenAI's: no file that is empty
                        file.begin(self._open(stack, file.ref))
                    file.write(mine)
            for file in (output, errors):
                file.end()
        return output.row(), errors.row()

    def _open(self, stack: ExitStack, ref: ObjectRef) -> BinaryIO:
        return stack.enter_context(self._store.write(ref, TYPE))

    def _pages(self, batch: Batch, still_ours: Callable[[], None]) -> Iterator[list[JobView]]:
        after = -1
        while True:
            still_ours()
            rows = self._database.read(
                reading.batch_results, batch.id, after_position=after, limit=PAGE
            )
            if not rows:
                return
            after = rows[-1].position if rows[-1].position is not None else after
            yield [job_view(row) for row in rows]


class _File:
    """One of the two output files of a batch whose input is a file."""

    def __init__(
        self, batch: Batch, file_id: str | None, kind: str, tenant: str, settings: Settings
    ) -> None:
        self._batch = batch
        self._id = file_id or new_id("fil")
        self._name = f"{batch.id}_{kind}.jsonl"
        self.ref = file_ref(tenant, self._id, settings)
        self.writer: JsonLines | None = None

    def begin(self, file: BinaryIO) -> None:
        line = native_line if self._batch.endpoint is None else openai_line
        self.writer = JsonLines(file, line, packed=False)

    def write(self, jobs: list[JobView]) -> None:
        if self.writer is not None:
            self.writer.write(jobs)

    def end(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def row(self) -> StoredFile | None:
        if self.writer is None:
            return None
        return StoredFile(
            id=self._id,
            tenant_id=self._batch.tenant_id,
            filename=self._name,
            purpose="batch_output",
            uri=self.ref.uri,
            size=self.writer.size,
        )
