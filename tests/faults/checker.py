"""The proof at the end of a round: each accepted job has come to one end, once, in its place.

Reads the database, the events of the result queue and the values in Redis; it does not ask the
processes that it checks. `tests/faults/test_checker.py` plants each kind of violation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from itertools import pairwise, product
from typing import Final

from models.tables import Job, Message
from models.views import job_view
from tests.faults.checker_batches import BatchCheck
from tests.faults.evidence import Evidence, Rows, Violation
from tests.faults.ledger import Asked, AskedFile, Ledger
from tests.faults.played_engine import answer_to
from visq import types
from visq.batch_files import output_names
from visq.errors import ImageChanged, ImageNotFound
from visq.types import JobStatus as S
from visq.types import Prompt

LEGAL: Final = {
    (None, S.QUEUED),
    (None, S.WAITING),
    (S.WAITING, S.QUEUED),
    (S.WAITING, S.CANCELLED),
    (S.QUEUED, S.RUNNING),
    (S.QUEUED, S.CANCELLED),
    (S.RUNNING, S.QUEUED),
    (S.RUNNING, S.SUCCEEDED),
    (S.RUNNING, S.FAILED),
    (S.RUNNING, S.CANCELLED),
}
"""Of jobs without a deadline that nobody retries by a call."""
EXPIRY: Final = {(status, S.EXPIRED) for status in (S.WAITING, S.QUEUED, S.RUNNING)}
RETRY: Final = (S.FAILED, S.QUEUED)


def check(ledger: Ledger, rows: Rows, evidence: Evidence) -> list[Violation]:
    """Everything that is wrong; empty: all promises were kept."""
    return list(_Check(ledger, rows, evidence).violations())


class _Check:
    def __init__(self, ledger: Ledger, rows: Rows, evidence: Evidence) -> None:
        self._ledger = ledger
        self._rows = rows
        self._evidence = evidence

    def violations(self) -> Iterator[Violation]:
        for problem in self._ledger.problems:
            yield Violation("client", "load", problem)
        asked: dict[str, Asked] = {}
        for job_id, each in self._ledger.jobs.items():
            if job_id in self._rows.jobs:
                asked[job_id] = each
            else:
                yield Violation("lost", job_id, "was accepted, and is not in the database")
        batches = BatchCheck(self._ledger, self._rows, self._evidence)
        for batch_id, items in self._ledger.batches.items():
            yield from batches.of_items(batch_id, items, asked)
        for batch_id, file in self._ledger.files.items():
            yield from batches.of_file(batch_id, file, asked)
        for job_id in self._rows.jobs.keys() - asked.keys():
            yield Violation("doubled", job_id, "nobody has asked for this job")
        for job_id, each in asked.items():
            yield from self._job(self._rows.jobs[job_id], each)
        for session_id, turns in self._ledger.turns.items():
            yield from self._session(session_id, turns)
        for batch_id, file in self._ledger.files.items():
            yield from self._sessions_of_file(batch_id, file)
        yield from self._objects()
        if self._rows.outbox:
            yield Violation("left behind", "outbox", f"{self._rows.outbox} entries")
        if self._rows.running_elsewhere:
            yield Violation(
                "left behind", "jobs", f"{self._rows.running_elsewhere} of earlier rounds"
            )

    def _objects(self) -> Iterator[Violation]:
        there = set(self._evidence.objects)
        needed = self._ledger.pictures.versions.keys() | self._ledger.objects
        written = {
            name
            for file in self._ledger.files.values()
            for name in astuple(output_names(file.output_uri))
        }
        for name in there - needed - written:
            yield Violation("left behind", name, "nobody needs it any more")
        for name in needed - there:
            yield Violation("lost", name, "was put into the store, and is not there")
        for name in self._evidence.unfinished_uploads:
            yield Violation("left behind", name, "parts of it are in the store")

    # --- a job -------------------------------------------------------------------------------

    def _job(self, job: Job, asked: Asked) -> Iterator[Violation]:
        if not job.status.is_terminal:
            yield Violation("lost", job.id, f"is still {job.status}")
            return
        if job.status not in self._ends(job, asked):
            why = f"{job.error_code}: {job.error_message}"
            yield Violation("wrong end", job.id, f"{job.status} after {job.attempt} ({why})")
        if job.lease_expires_at is not None or job.publish_at is not None:
            yield Violation("left behind", job.id, "an ended job has a lease or is to be published")
        if asked.poison != (job.dead_at is not None):
            yield Violation("wrong end", job.id, "the poison jobs, and only they, are dead letters")
        own_failures = 1 if job.status is S.FAILED and not asked.wrong else 0
        if not asked.poison and job.failures != own_failures:
            yield Violation("blamed", job.id, f"{job.failures} failures that were not its own")
        if job.status is S.EXPIRED and not _is_late(job):
            yield Violation("wrong end", job.id, "expired before its deadline")
        yield from self._history(job, asked)
        if job.status is S.SUCCEEDED:
            yield from self._answer(job, asked)
        yield from self._told(job)

    def _ends(self, job: Job, asked: Asked) -> set[S]:
        """How it may end."""
        if asked.poison or asked.wrong:
            return {S.FAILED}
        if asked.missing:
            return {S.FAILED} if job.error_code == ImageNotFound.code else set()
        ends = {S.SUCCEEDED}
        if asked.may_be_cancelled:
            ends.add(S.CANCELLED)
        if asked.may_expire:
            ends.add(S.EXPIRED)
        if job.error_code in self._faults_of_pictures(job, asked):
            ends.add(S.FAILED)
        return ends

    def _faults_of_pictures(self, job: Job, asked: Asked) -> set[str]:
        """With which codes it may fail, since somebody has replaced or deleted its pictures."""
        turns = self._ledger.turns.get(job.session_id or "", [])
        earlier = turns[: turns.index(job.id)] if job.id in turns else []
        shown = [*asked.pictures, *(n for id_ in earlier for n in self._ledger.jobs[id_].pictures)]
        pictures = self._ledger.pictures
        codes = set()
        if pictures.gone.intersection(shown):
            codes.add(ImageNotFound.code)
        if earlier and pictures.changed(shown):
            codes.add(ImageChanged.code)
        return codes

    def _history(self, job: Job, asked: Asked) -> Iterator[Violation]:
        events = self._rows.events.get(job.id, [])
        steps = [(event.from_status, event.to_status) for event in events]
        if not steps or steps[0][0] is not None:
            yield Violation("history", job.id, "does not begin with its submission")
            return
        for before, after in pairwise(steps):
            if before[1] is not after[0]:
                yield Violation("history", job.id, f"{before[1]} is followed by {after}")
        legal = LEGAL | (EXPIRY if asked.may_expire else set())
        if asked.wrong:
            legal = {(None, S.FAILED)}
        retries = self._ledger.retries[job.id]
        for step in steps:
            if step not in legal and not (retries and step == RETRY):
                yield Violation("history", job.id, f"{step} is no legal step")
        ends = [to for _, to in steps if to.is_terminal]
        if ends[-1:] != [job.status] or set(ends[:-1]) - {S.FAILED}:
            yield Violation("history", job.id, f"ends {ends}, and the job is {job.status}")
        if not min(retries, 1) < len(ends) <= 1 + retries:
            yield Violation("history", job.id, f"{len(ends)} ends after {retries} calls to retry")
        claims = [event.attempt for event in events if event.to_status is S.RUNNING]
        if claims != list(range(1, job.attempt + 1)):
            yield Violation("history", job.id, f"claims {claims} for attempt {job.attempt}")

    def _answer(self, job: Job, asked: Asked) -> Iterator[Violation]:
        if asked.prompt not in str(job.request):
            yield Violation("wrong answer", job.id, "the request is not what was asked")
        if not job.request:
            yield Violation("wrong answer", job.id, "there is nothing that it was asked")
            return
        text = (job.result or {}).get("text")
        author = self._author(job)
        if job.session_id in self._ledger.deleted:
            # What the engine was shown is deleted.
            if not str(text).endswith(f" by {author}"):
                yield Violation("wrong answer", job.id, f"{text!r} is not by {author}")
            return
        messages, pictures = self._shown(job)
        expected = [answer_to(messages, each, author) for each in product(*pictures)]
        if text not in expected:
            yield Violation("wrong answer", job.id, f"{text!r} in place of {expected!r}")

    def _author(self, job: Job) -> int:
        """Process id of the worker whose answer it has."""
        origin: Job | None = job
        if (name := (job.result or {}).get("duplicate_of")) is not None:
            items = [each for each in self._rows.jobs.values() if each.batch_id == job.batch_id]
            origin = next((each for each in items if each.custom_id == name), None)
        worker = None if origin is None else origin.worker
        return int((worker or "::0").split(":")[1] or 0)

    def _shown(self, job: Job) -> tuple[list[types.Message], list[Sequence[str]]]:
        """What the engine must have been shown: the turns before, and this one; and of each picture
        the files that it may have been."""
        earlier = [
            types.Message.model_validate({"role": row.role, "content": row.content})
            for row in self._rows.messages.get(job.session_id or "", [])
            if row.turn < (job.turn or 0)
        ]
        request = {k: v for k, v in job.request.items() if k != "on_image_change"}
        messages = [*earlier, *Prompt.model_validate(request).as_messages()]
        versions = self._ledger.pictures.versions
        pictures = [
            # What was shown once may not be shown as anything else later.
            [each for each in versions[part.image_url.url] if part.sha256 in (None, each)]
            for message in messages
            for part in message.parts()
            if isinstance(part, types.ImagePart)
        ]
        return messages, pictures

    def _told(self, job: Job) -> Iterator[Violation]:
        view = job_view(job).model_dump(mode="json")
        lost = self._evidence.lost_before
        ends = [each for each in self._rows.events.get(job.id, []) if each.to_status.is_terminal]
        kept = [end for end in ends if lost is None or end.at > lost]
        events = self._evidence.events.get(job.id, [])
        told = {event["id"]: event["data"] for event in events}
        if len(told) < len(kept if self._evidence.events_in_redis else ends):
            yield Violation("untold", job.id, f"{len(told)} result events for {len(ends)} ends")
        if len(told) > len(ends):
            yield Violation("told twice", job.id, "its events have different ids")
        if any(event["data"] != told[event["id"]] for event in events):
            yield Violation("told wrongly", job.id, "a repeat says something else")
        for data in told.values():
            earlier = data["attempt"] < job.attempt and data["status"] == S.FAILED
            if data != view and not (len(ends) > 1 and earlier):
                yield Violation("told wrongly", job.id, "an event is not what the row says")
                break
        if len(told) == len(ends) and view not in told.values():
            yield Violation("told wrongly", job.id, "no event is what the row says")
        value = self._evidence.values.get(job.id)
        if value is None and kept[-1:] == ends[-1:]:
            yield Violation("untold", job.id, "Redis has no result")
        if value is not None and value != view:
            yield Violation("told wrongly", job.id, "Redis says something else than the row")

    # --- sessions ----------------------------------------------------------------

    def _session(self, session_id: str, accepted: Sequence[str]) -> Iterator[Violation]:
        jobs = [self._rows.jobs[id_] for id_ in accepted if id_ in self._rows.jobs]
        turns = [job.turn for job in jobs]
        if turns != list(range(1, len(accepted) + 1)):
            yield Violation("out of order", session_id, f"turns {turns}")
        row = self._rows.sessions.get(session_id)
        if row is not None and row.turns != len(accepted):
            yield Violation("out of order", session_id, f"counts {row.turns} turns")
        deleted = session_id in self._ledger.deleted
        if row is not None and deleted != (row.deleted_at is not None):
            what = "is not deleted" if deleted else "is deleted, and nobody asked for it"
            yield Violation("left behind", session_id, what)
        # A turn that was never begun may have been cancelled before those that came before it.
        for before, after in pairwise([job for job in jobs if job.started_at is not None]):
            if before.finished_at and after.started_at and before.finished_at > after.started_at:
                yield Violation("out of order", session_id, f"turn {after.turn} ran too early")
        if deleted:
            if self._messages(session_id):
                yield Violation("left behind", session_id, "a deleted session has messages")
            return
        kept = [
            (row.turn, row.position, row.role, row.job_id) for row in self._messages(session_id)
        ]
        expected = [
            (job.turn, position, role, job.id)
            for job in jobs
            if job.status is S.SUCCEEDED
            for position, role in enumerate(("user", "assistant"))
        ]
        if kept != expected:
            yield Violation("out of order", session_id, f"the history is {kept}")
        for job in jobs:
            said = [row for row in self._messages(session_id) if row.job_id == job.id][1:]
            text = (job.result or {}).get("text")
            if said and said[0].content != [{"type": "text", "text": text}]:
                yield Violation("out of order", session_id, f"turn {job.turn} is kept wrongly")

    def _sessions_of_file(self, batch_id: str, file: AskedFile) -> Iterator[Violation]:
        items = [job for job in self._rows.jobs.values() if job.batch_id == batch_id]
        by_name = {job.custom_id: job for job in items}
        seen: set[str | None] = set()
        for chain in file.chains:
            turns = [by_name[name] for name in chain if name in by_name]
            ids = {job.session_id for job in turns}
            if len(ids) != 1 or None in ids or ids & seen:
                yield Violation("out of order", batch_id, f"{chain} are in the sessions {ids}")
                continue
            seen |= ids
            yield from self._session(str(ids.pop()), [job.id for job in turns])

    def _messages(self, session_id: str) -> Sequence[Message]:
        return self._rows.messages.get(session_id, [])


def _is_late(job: Job) -> bool:
    return (
        job.expires_at is not None
        and job.finished_at is not None
        and job.expires_at <= job.finished_at
    )
