"""Jobs that have ended, many at a time, for `bench.full_table`: written by SQL, not by visq.

Of ten, five are single jobs, two are turns of a session of five turns, three are items of batches.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import text

from models.database import Database

NOW: Final = "2026-01-05 09:30:00.000000"
REQUEST: Final = (
    '{"prompt": "What is on this picture? Answer with one word.", '
    '"images": ["s3://photos/2026/01/05/a-picture-with-a-long-name.jpg"], '
    '"gen_config": {"max_new_tokens": 64}, "on_image_change": "fail"}'
)
RESULT: Final = (
    '{"text": "A cat that sits on a red sofa and looks at whoever takes the picture.", '
    '"finish_reason": "stop", "usage": {"prompt_tokens": 1042, "completion_tokens": 18, '
    '"image_tokens": 1024, "cached_tokens": 0}, "model": "small"}'
)
BATCH_SIZE: Final = 10_000
STEPS: Final = 20
"""Jobs go from state to state in so many parts of all."""


class Rows:
    """Writes them into a migrated database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._is_sqlite = database.engine.dialect.name == "sqlite"

    def fill(self, count: int) -> None:
        """`count` jobs, each of which was queued and running before: `count` is a multiple of
        1,000."""
        self._sql(
            f"INSERT INTO tenants (id, name, created_at) VALUES ('ten_full', 'full', '{NOW}')"
        )
        sessions = count // 25
        self._sql(
            "INSERT INTO sessions (id, tenant_id, turns, metadata, created_at, updated_at) "
            f"SELECT {self._id('ses', 'n')}, 'ten_full', 5, '{{}}', '{NOW}', '{NOW}' "
            f"FROM {self._numbers(0, sessions)}"
        )
        self._sql(
            "INSERT INTO batches (id, tenant_id, status, lane, total, succeeded, failed, "
            "cancelled, expired, ends, metadata, created_at, finished_at) "
            f"SELECT {self._id('bat', 'n')}, 'ten_full', 'completed', 'batch', {BATCH_SIZE}, "
            f"{BATCH_SIZE}, 0, 0, 0, {BATCH_SIZE}, '{{}}', '{NOW}', '{NOW}' "
            f"FROM {self._numbers(0, count * 3 // 10 // BATCH_SIZE + 1)}"
        )
        step = max(1, count // STEPS)
        for first in range(0, count, step):
            self._live(first, min(first + step, count), sessions)

    def end_more_of(self, batch_id: str, count: int, *, like: str | None = None) -> None:
        """Add `count` items that have ended to an open batch, before those that it has.

        :param like: their `dedupe_key`.
        """
        self._sql(
            "UPDATE jobs SET position = position + :n WHERE batch_id = :b", n=count, b=batch_id
        )
        key = "NULL" if like is None else f"'{like}'"
        self._sql(
            "INSERT INTO jobs (id, tenant_id, kind, status, lane, batch_id, custom_id, position, "
            "dispatch_order, dedupe_key, request, metadata, attempt, failures, max_attempts, "
            "publishes, result, created_at, started_at, finished_at) "
            f"SELECT {self._id('job', 'n', batch_id[-8:])}, tenant_id, 'generate', 'succeeded', "
            f"'batch', id, 'old-' || n, n, n, {key}, '{REQUEST}', '{{}}', 1, 0, 3, 1, '{RESULT}', "
            f"'{NOW}', '{NOW}', '{NOW}' FROM batches, {self._numbers(0, count)} WHERE id = :b",
            b=batch_id,
        )
        self._sql(
            "INSERT INTO batch_ends (batch_id, number, job_id) SELECT batch_id, 1000000 + position,"
            " id FROM jobs WHERE batch_id = :b AND status = 'succeeded'",
            b=batch_id,
        )
        self._sql(
            "UPDATE batches SET total = total + :n, succeeded = succeeded + :n, "
            "ends = 1000000 + :n WHERE id = :b",
            n=count,
            b=batch_id,
        )

    def end_all(self) -> None:
        """Whatever has not ended is cancelled."""
        self._sql(
            f"UPDATE jobs SET status = 'cancelled', finished_at = '{NOW}', publish_at = NULL, "
            "lease_expires_at = NULL WHERE finished_at IS NULL"
        )
        self._sql(
            f"UPDATE batches SET status = 'cancelled', finished_at = '{NOW}' "
            "WHERE finished_at IS NULL"
        )
        self._sql("DELETE FROM outbox")

    def analyze(self, *, vacuum: bool = False) -> None:
        """Tell the planner what there is; take away what is dead."""
        with self._database.engine.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text("VACUUM ANALYZE" if vacuum else "ANALYZE"))

    def _live(self, first: int, last: int, sessions: int) -> None:
        turn, item = "(n / 10 * 2 + n % 10 - 5)", "(n / 10 * 3 + n % 10 - 7)"
        is_turn, is_item = "n % 10 IN (5, 6)", "n % 10 > 6"
        numbers = self._numbers(first, last)
        self._sql(
            "INSERT INTO jobs (id, tenant_id, kind, status, lane, session_id, turn, batch_id, "
            "custom_id, position, dispatch_order, request, metadata, attempt, failures, "
            "max_attempts, publishes, publish_at, created_at) "
            f"SELECT {self._id('job', 'n')}, 'ten_full', 'generate', 'queued', "
            f"CASE WHEN {is_item} THEN 'batch' ELSE 'standard' END, "
            f"CASE WHEN {is_turn} THEN {self._id('ses', f'{turn} % {sessions}')} END, "
            f"CASE WHEN {is_turn} THEN {turn} / {sessions} + 1 END, "
            f"CASE WHEN {is_item} THEN {self._id('bat', f'{item} / {BATCH_SIZE}')} END, "
            f"CASE WHEN {is_item} THEN 'item-' || n END, "
            f"CASE WHEN {is_item} THEN {item} % {BATCH_SIZE} END, "
            f"CASE WHEN {is_item} THEN {item} % {BATCH_SIZE} END, "
            f"'{REQUEST}', '{{}}', 0, 0, 3, 1, '{NOW}', '{NOW}' FROM {numbers}"
        )
        mine = f"id BETWEEN {self._id('job', str(first))} AND {self._id('job', str(last - 1))}"
        self._sql(
            "UPDATE jobs SET status = 'running', attempt = 1, worker = 'host:1:abc', "
            f"publish_at = NULL, started_at = '{NOW}', lease_expires_at = '{NOW}' WHERE {mine}"
        )
        self._sql(
            "UPDATE jobs SET lease_expires_at = NULL, "
            f"finished_at = '{NOW}', result = '{RESULT}', status = CASE {self._last_digits()} "
            "WHEN '00' THEN 'failed' WHEN '01' THEN 'cancelled' WHEN '02' THEN 'expired' "
            f"ELSE 'succeeded' END WHERE {mine}"
        )
        self._sql(
            "UPDATE jobs SET result = NULL, error_code = 'attempts_exhausted', error_message = 'x',"
            f" dead_at = '{NOW}' WHERE {mine} AND id LIKE '%000' AND status = 'failed'"
        )
        for before, after in (("NULL", "queued"), ("'queued'", "running"), ("'running'", "ended")):
            to = "status" if after == "ended" else f"'{after}'"
            self._sql(
                "INSERT INTO job_events (tenant_id, job_id, at, from_status, to_status, attempt) "
                f"SELECT tenant_id, id, '{NOW}', {before}, {to}, 1 FROM jobs WHERE {mine}"
            )
        self._sql(
            "INSERT INTO batch_ends (batch_id, number, job_id) SELECT batch_id, position + 1, id "
            f"FROM jobs WHERE {mine} AND batch_id IS NOT NULL"
        )

    def _numbers(self, first: int, last: int) -> str:
        """A table with the column ``n``, from `first` up to before `last`."""
        return (
            f"(WITH RECURSIVE numbers(n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM numbers "
            f"WHERE n + 1 < {last}) SELECT n FROM numbers) AS of_numbers"
        )

    def _id(self, prefix: str, number: str, middle: str = "") -> str:
        """Older than any that visq makes."""
        zeros = "0" * (32 - len(middle))
        digits = f"'{zeros}' || ({number})"
        cut = f"substr({digits}, -{len(zeros)})"
        if not self._is_sqlite:
            cut = f"right({digits}, {len(zeros)})"
        return f"('{prefix}_{middle}' || {cut})"

    def _last_digits(self) -> str:
        return "substr(id, -2)" if self._is_sqlite else "right(id, 2)"

    def _sql(self, statement: str, **values: object) -> None:
        self._database.run(lambda session: session.execute(text(statement), values))
