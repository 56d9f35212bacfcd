"""The checker finds each kind of violation in batches that is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.played_round import Played
from visq.batch_files import output_names


def change(played: Played, at: int, **columns: Any) -> None:
    """Other values for the item at the place `at`."""
    values = ", ".join(f"{column} = :{column}" for column in columns)
    played.sql(f"UPDATE jobs SET {values} WHERE id = :id", id=played.lines[at], **columns)


def rewrite(played: Played, name: str, edit: Callable[[list[bytes]], object]) -> None:
    lines = played.evidence.files[name].splitlines(keepends=True)
    edit(lines)
    played.evidence.files[name] = b"".join(lines)


def output(played: Played) -> str:
    return output_names(played.file.output_uri).output


def errors(played: Played) -> str:
    return output_names(played.file.output_uri).errors


def batch_id(played: Played) -> str:
    [found] = played.ledger.files
    return found


def event_of(played: Played) -> dict[str, Any]:
    [event] = played.evidence.events[batch_id(played)]
    return event


def line_is_gone(played: Played) -> None:
    for table in ("batch_ends", "job_events"):
        played.sql(f"DELETE FROM {table} WHERE job_id = :id", id=played.lines[0])
    played.sql("DELETE FROM jobs WHERE id = :id", id=played.lines[0])


def line_is_two_items(played: Played) -> None:
    change(played, 1, position=0)


def lines_have_changed_places(played: Played) -> None:
    for at, other in ((0, 100), (1, 0), (0, 1)):
        change(played, at, position=other)


def line_has_another_name(played: Played) -> None:
    change(played, 0, custom_id="another")


def wrong_line_succeeded(played: Played) -> None:
    change(played, 9, status="succeeded")


def wrong_line_has_run(played: Played) -> None:
    played.sql(
        "INSERT INTO job_events (tenant_id, job_id, at, from_status, to_status, attempt) SELECT "
        "tenant_id, job_id, at, 'queued', 'running', 1 FROM job_events WHERE job_id = :id",
        id=played.lines[9],
    )


def wrong_line_does_not_say_where(played: Played) -> None:
    change(played, 9, error_message="something is wrong")


def equal_line_has_the_answer_to_another(played: Played) -> None:
    played.sql(
        "UPDATE jobs SET result = json_set(result, '$.duplicate_of', 'line-0') WHERE id = :id",
        id=played.lines[8],
    )


def answer_of_an_equal_line_is_another(played: Played) -> None:
    played.sql(
        "UPDATE jobs SET result = json_set(result, '$.text', 'x') WHERE id = :id",
        id=played.lines[8],
    )


def turn_is_in_another_session(played: Played) -> None:
    played.sql(
        "UPDATE jobs SET session_id = (SELECT session_id FROM jobs WHERE id = :other), turn = 9 "
        "WHERE id = :id",
        id=played.lines[5],
        other=played.lines[14],
    )


def turns_ran_in_another_order(played: Played) -> None:
    change(played, 6, started_at="2000-01-01 00:00:00.000000")


def total_is_wrong(played: Played) -> None:
    played.sql("UPDATE batches SET total = total + 1 WHERE id = :id", id=batch_id(played))


def is_still_held(played: Played) -> None:
    played.sql("UPDATE batches SET held_until = created_at WHERE id = :id", id=batch_id(played))


def failed_as_a_whole(played: Played) -> None:
    played.sql("UPDATE batches SET status = 'failed' WHERE id = :id", id=batch_id(played))


def output_is_missing(played: Played) -> None:
    del played.evidence.files[output(played)]


def output_lacks_a_line(played: Played) -> None:
    rewrite(played, output(played), lambda lines: lines.pop(3))


def output_has_a_line_twice(played: Played) -> None:
    rewrite(played, output(played), lambda lines: lines.append(lines[3]))


def output_is_in_another_order(played: Played) -> None:
    rewrite(played, output(played), lambda lines: lines.reverse())


def output_says_something_else(played: Played) -> None:
    def edit(lines: list[bytes]) -> None:
        line = json.loads(lines[0])
        line["result"]["text"] = "something else"
        lines[0] = json.dumps(line).encode() + b"\n"

    rewrite(played, output(played), edit)


def errors_are_missing(played: Played) -> None:
    del played.evidence.files[errors(played)]


def errors_lack_a_line(played: Played) -> None:
    rewrite(played, errors(played), lambda lines: lines.pop())


def errors_have_what_succeeded(played: Played) -> None:
    more = played.evidence.files[output(played)].splitlines(keepends=True)[0]
    rewrite(played, errors(played), lambda lines: lines.insert(0, more))


def summary_is_missing(played: Played) -> None:
    del played.evidence.files[output_names(played.file.output_uri).summary]


def summary_counts_wrongly(played: Played) -> None:
    name = output_names(played.file.output_uri).summary
    said = json.loads(played.evidence.files[name])
    said["counts"]["failed"] += 1
    played.evidence.files[name] = json.dumps(said).encode()


def a_number_is_left_out(played: Played) -> None:
    played.sql(
        "UPDATE batch_ends SET number = 100 WHERE batch_id = :id AND number = 5",
        id=batch_id(played),
    )


def an_end_is_not_numbered(played: Played) -> None:
    played.sql("DELETE FROM batch_ends WHERE batch_id = :id AND number = 30", id=batch_id(played))


def an_item_has_ended_twice(played: Played) -> None:
    played.sql(
        "UPDATE batch_ends SET job_id = :job WHERE batch_id = :id AND number = 5",
        id=batch_id(played),
        job=played.lines[0],
    )


def its_event_is_missing(played: Played) -> None:
    del played.evidence.events[batch_id(played)]


def its_event_has_two_ids(played: Played) -> None:
    played.evidence.events[batch_id(played)].append(event_of(played) | {"id": "evt_other"})


def its_event_counts_wrongly(played: Played) -> None:
    event_of(played)["data"]["counts"]["failed"] += 1


def parts_are_left(played: Played) -> None:
    played.evidence.unfinished_uploads = [output(played)]


def a_file_is_left(played: Played) -> None:
    played.evidence.objects.append(f"{output(played)}.tmp")


def its_input_is_gone(played: Played) -> None:
    played.evidence.objects.remove(played.file.input_uri)


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (line_is_gone, "lost"),
        (line_is_two_items, "lost"),
        (lines_have_changed_places, "wrong item"),
        (line_has_another_name, "wrong item"),
        (wrong_line_succeeded, "wrong end"),
        (wrong_line_has_run, "history"),
        (wrong_line_does_not_say_where, "wrong item"),
        (equal_line_has_the_answer_to_another, "wrong answer"),
        (answer_of_an_equal_line_is_another, "wrong answer"),
        (turn_is_in_another_session, "out of order"),
        (turns_ran_in_another_order, "out of order"),
        (total_is_wrong, "counters"),
        (is_still_held, "left behind"),
        (failed_as_a_whole, "counters"),
        (output_is_missing, "lost"),
        (output_lacks_a_line, "lost"),
        (output_has_a_line_twice, "doubled"),
        (output_is_in_another_order, "out of order"),
        (output_says_something_else, "lost"),
        (errors_are_missing, "lost"),
        (errors_lack_a_line, "lost"),
        (errors_have_what_succeeded, "out of order"),
        (summary_is_missing, "lost"),
        (summary_counts_wrongly, "told wrongly"),
        (a_number_is_left_out, "ends"),
        (an_end_is_not_numbered, "ends"),
        (an_item_has_ended_twice, "ends"),
        (its_event_is_missing, "untold"),
        (its_event_has_two_ids, "told twice"),
        (its_event_counts_wrongly, "told wrongly"),
        (parts_are_left, "left behind"),
        (a_file_is_left, "left behind"),
        (its_input_is_gone, "lost"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_planted_violation_is_found(
    played: Played, plant: Callable[[Played], None], kind: str
) -> None:
    assert played.kinds() == set()
    plant(played)
    assert kind in played.kinds()
