"""The part of the proof that is about batches: their rows, counters and ends, what was told of
them, and the files that they write."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from models.tables import Batch, Job
from models.views import batch_view, job_view
from tests.faults.evidence import Evidence, Rows, Violation
from tests.faults.ledger import Asked, AskedFile, Ledger
from visq.batch_files import output_names
from visq.errors import DuplicateCustomId
from visq.types import BatchStatus, JobView
from visq.types import JobStatus as S


class BatchCheck:
    """Checks the batches of one round."""

    def __init__(self, ledger: Ledger, rows: Rows, evidence: Evidence) -> None:
        self._ledger = ledger
        self._rows = rows
        self._evidence = evidence

    def of_items(
        self, batch_id: str, items: Mapping[str, Asked], asked: dict[str, Asked]
    ) -> Iterator[Violation]:
        """A batch whose items came with the request. Adds to `asked`, by job id."""
        rows = self._items(batch_id)
        by_name = {job.custom_id: job for job in rows}
        if len(rows) != len(items) or by_name.keys() != items.keys():
            yield Violation("lost", batch_id, f"has {len(rows)} items of {len(items)}")
        asked |= {by_name[name].id: items[name] for name in by_name.keys() & items.keys() if name}
        yield from self._batch(batch_id, rows, len(items))

    def of_file(
        self, batch_id: str, file: AskedFile, asked: dict[str, Asked]
    ) -> Iterator[Violation]:
        """A batch from a file: each line is one item, at its place."""
        rows = self._items(batch_id)
        positions = [job.position for job in rows]
        if positions != list(range(len(file.lines))):
            yield Violation("lost", batch_id, f"has the lines {positions} of {len(file.lines)}")
        for job in rows:
            if job.position is None or job.position >= len(file.lines):
                continue
            line = file.lines[job.position]
            asked[job.id] = line.asked
            if job.custom_id != line.custom_id:
                yield Violation("wrong item", job.id, f"is {job.custom_id}, not {line.custom_id}")
            if line.asked.wrong and not _says_what_is_wrong(job):
                yield Violation("wrong item", job.id, f"{job.error_message} does not say why")
            origin = (job.result or {}).get("duplicate_of")
            if origin is not None and not (line.equal and self._asks_the_same(file, origin)):
                yield Violation("wrong answer", job.id, f"has the answer to {origin}")
        yield from self._batch(batch_id, rows, len(file.lines))
        yield from self._files(batch_id, file, rows)

    def _asks_the_same(self, file: AskedFile, custom_id: str) -> bool:
        return any(line.equal and line.custom_id == custom_id for line in file.lines)

    def _items(self, batch_id: str) -> list[Job]:
        rows = [job for job in self._rows.jobs.values() if job.batch_id == batch_id]
        return sorted(rows, key=lambda job: job.position or 0)

    def _batch(self, batch_id: str, rows: Sequence[Job], total: int) -> Iterator[Violation]:
        batch = self._rows.batches.get(batch_id)
        if batch is None:
            yield Violation("lost", batch_id, "was accepted, and is not in the database")
            return
        counted = Counter(job.status for job in rows)
        counters = {
            S.SUCCEEDED: batch.succeeded,
            S.FAILED: batch.failed,
            S.CANCELLED: batch.cancelled,
            S.EXPIRED: batch.expired,
        }
        if batch.total != total or any(counted[s] != n for s, n in counters.items()):
            yield Violation("counters", batch_id, f"says {counters}, the rows say {counted}")
        ends = {BatchStatus.EXPIRED if counted[S.EXPIRED] else BatchStatus.COMPLETED}
        if batch_id in self._ledger.cancelled:
            ends.add(BatchStatus.CANCELLED)
        if batch.status not in ends or batch.finished_at is None:
            yield Violation("counters", batch_id, f"is {batch.status} at the end: {batch.errors}")
        if batch.held_until is not None:
            yield Violation("left behind", batch_id, "is still held")
        yield from self._ends(batch, rows)
        yield from self._told(batch)

    def _ends(self, batch: Batch, rows: Sequence[Job]) -> Iterator[Violation]:
        ends = self._rows.ends.get(batch.id, [])
        numbers = [number for number, _ in ends]
        if numbers != list(range(1, batch.ends + 1)):
            yield Violation("ends", batch.id, f"numbered {numbers} of {batch.ends}")
        times = Counter(job_id for _, job_id in ends)
        if times != Counter(job.id for job in rows):
            yield Violation("ends", batch.id, "an item is missing among its ends, or twice there")

    def _told(self, batch: Batch) -> Iterator[Violation]:
        lost = self._evidence.lost_before
        events = self._evidence.events.get(batch.id, [])
        excused = (
            self._evidence.events_in_redis
            and lost is not None
            and batch.finished_at is not None
            and batch.finished_at <= lost
        )
        if not events and not excused and batch.result_queue is not None:
            yield Violation("untold", batch.id, "no event says that it has ended")
        if len({event["id"] for event in events}) > 1:
            yield Violation("told twice", batch.id, "its events have different ids")
        view = batch_view(batch).model_dump(mode="json")
        if any(event["data"] != view for event in events):
            yield Violation("told wrongly", batch.id, "an event is not what the row says")

    def _files(self, batch_id: str, file: AskedFile, rows: Sequence[Job]) -> Iterator[Violation]:
        names = output_names(file.output_uri)
        expected = [_line(job_view(job)) for job in rows]
        wrong = [line for line in expected if line["status"] != S.SUCCEEDED]
        for name, lines in ((names.output, expected), (names.errors, wrong)):
            found = self._evidence.files.get(name)
            if found is None:
                yield Violation("lost", name, f"{batch_id} has not written it")
                continue
            read = [json.loads(line) for line in found.splitlines()]
            for kind, ids in (
                ("lost", [line["id"] for line in lines if line not in read]),
                ("doubled", [line["id"] for line in read if read.count(line) > 1]),
            ):
                if ids:
                    yield Violation(kind, name, f"the lines of {ids}")
            if read != lines:
                yield Violation("out of order", name, f"{len(read)} lines, not those of the rows")
        summary = self._evidence.files.get(names.summary)
        batch = self._rows.batches.get(batch_id)
        if summary is None:
            yield Violation("lost", names.summary, f"{batch_id} has not written it")
        elif batch is not None:
            said, view = json.loads(summary), batch_view(batch).model_dump(mode="json")
            if any(said[field] != view[field] for field in ("id", "status", "counts", "usage")):
                yield Violation("told wrongly", names.summary, "is not what the row says")


def _says_what_is_wrong(job: Job) -> bool:
    if job.error_code == DuplicateCustomId.code:
        return True
    return f"line {(job.position or 0) + 1}:" in (job.error_message or "")


def _line(job: JobView) -> dict[str, Any]:
    """What an output has of an item; what is nothing is left out."""
    view = job.model_dump(mode="json", exclude_none=True)
    fields = ("id", "custom_id", "position", "status", "result", "error", "session_id", "turn")
    return {field: view[field] for field in fields if field in view}
