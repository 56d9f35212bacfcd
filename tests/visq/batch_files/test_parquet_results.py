"""Results as rows of Parquet files, as any reader of such files sees them."""

from __future__ import annotations

import gc
import io
import json
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visq.batch_files.parquet import ParquetResults
from visq.batch_files.parquet_results import ROWS, ROWS_BYTES, SCHEMA
from visq.batch_files.results import native_line, open_writer
from visq.errors import Unavailable
from visq.types import Choice, ErrorBody, JobKind, JobResult, JobStatus, JobView, Lane, Usage

NOW = datetime(2026, 11, 25, tzinfo=UTC)


def job(position: int, status: JobStatus = JobStatus.SUCCEEDED, **fields: Any) -> JobView:
    return JobView(
        id=f"job_{position:032x}",
        kind=JobKind.CHAT,
        status=status,
        lane=Lane.BATCH,
        batch_id="bat_1",
        custom_id=f"row {position}",
        position=position,
        attempt=1,
        max_attempts=3,
        metadata={},
        created_at=NOW,
        **fields,
    )


def answer(text: str = "a café", **fields: Any) -> JobResult:
    usage = Usage(prompt_tokens=10, completion_tokens=4, images=2, cached_tokens=3)
    return JobResult(text=text, finish_reason="stop", usage=usage, model="small", **fields)


def written(*pages: list[JobView]) -> pq.ParquetFile:
    file = io.BytesIO()
    writer = ParquetResults(file)
    for page in pages:
        writer.write(page)
    writer.close()
    assert not file.closed
    return pq.ParquetFile(io.BytesIO(file.getvalue()))


def rows(*jobs: JobView) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = written([*jobs]).read().to_pylist()
    return found


def test_a_result_is_a_row() -> None:
    (row,) = rows(job(5, result=answer(), session_id="ses_1", turn=3))
    assert json.loads(row.pop("result")) == answer().model_dump(exclude_none=True)
    assert row == {
        "id": f"job_{5:032x}",
        "custom_id": "row 5",
        "position": 5,
        "status": "succeeded",
        "text": "a café",
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "cached_tokens": 3,
        "images": 2,
        "error_code": None,
        "error_message": None,
        "error_param": None,
        "session_id": "ses_1",
        "turn": 3,
    }


def test_an_error_is_a_row() -> None:
    error = ErrorBody(code="image_not_found", message="no image", param="images.0")
    (row,) = rows(job(5, JobStatus.FAILED, error=error))
    said = {name: value for name, value in row.items() if value is not None}
    assert said == {
        "id": f"job_{5:032x}",
        "custom_id": "row 5",
        "position": 5,
        "status": "failed",
        "error_code": "image_not_found",
        "error_message": "no image",
        "error_param": "images.0",
    }


def test_an_item_that_never_ran_is_a_row() -> None:
    (row,) = rows(job(5, JobStatus.CANCELLED))
    assert (row["status"], row["text"], row["error_code"]) == ("cancelled", None, None)


def test_the_whole_result_is_in_its_json() -> None:
    choices = [Choice(text=text, finish_reason="stop") for text in ("one", "two")]
    full = answer("one", choices=choices, token_ids=[1], logprobs=[{1: -0.5}], tokens={1: "one"})
    (row,) = rows(job(0, result=full))
    assert JobResult.model_validate_json(row["result"]) == full


def test_rows_say_what_json_lines_say() -> None:
    ended = job(5, result=answer(), session_id="ses_1", turn=3)
    (row,) = rows(ended)
    line = native_line(ended)
    assert json.loads(row["result"]) == line["result"]
    both = line.keys() & row.keys() - {"result"}
    assert {name: row[name] for name in both} == {name: line[name] for name in both}
    assert both == line.keys() - {"result"}


def test_without_items_there_are_no_rows() -> None:
    assert written().schema_arrow.equals(SCHEMA)
    assert written().metadata.num_rows == 0


def test_rows_are_in_order_and_in_groups_of_some_thousands() -> None:
    jobs = [job(position, result=answer()) for position in range(2 * ROWS + 10)]
    file = written(*(jobs[start : start + 300] for start in range(0, len(jobs), 300)))
    groups = [file.metadata.row_group(each).num_rows for each in range(file.num_row_groups)]
    assert groups == [ROWS, ROWS, 10]
    assert file.schema_arrow.equals(SCHEMA)
    assert file.read(["position"]).column(0).to_pylist() == [*range(2 * ROWS + 10)]


def test_long_results_make_small_groups() -> None:
    file = io.BytesIO()
    writer = ParquetResults(file)
    # Twice in each row: as text, and in the whole result.
    long = job(0, result=answer("x" * (ROWS_BYTES // 8)))
    sizes = []
    for _ in range(20):
        writer.write([long])
        sizes.append(file.tell())
    writer.close()
    assert len(set(sizes)) > 3
    assert pq.ParquetFile(io.BytesIO(file.getvalue())).num_row_groups == 5


def test_the_same_results_are_the_same_bytes() -> None:
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        writer = open_writer(file, "out.parquet", native_line)
        writer.write([job(0, result=answer())])
        writer.close()
    assert files[0].getvalue() == files[1].getvalue()


class Full(io.BytesIO):
    """A store that takes no more, some time."""

    is_full = False

    def write(self, data: Any, /) -> int:
        if self.is_full:
            raise Unavailable("the store took no more")
        return super().write(data)


def test_errors_of_the_store_pass_as_they_are() -> None:
    file = Full()
    writer = ParquetResults(file)
    writer.write([job(0, result=answer())])
    file.is_full = True
    with pytest.raises(Unavailable, match="took no more"):
        writer.close()


@pytest.mark.filterwarnings("error")
def test_a_writer_that_is_forgotten_writes_nothing_more() -> None:
    file = io.BytesIO()
    writer = ParquetResults(file)
    writer.write([job(position) for position in range(ROWS)])
    before = file.tell()
    assert before > 100
    del writer
    gc.collect()
    assert file.tell() == before
    with pytest.raises(pa.ArrowInvalid):
        pq.ParquetFile(file)


@pytest.mark.filterwarnings("error")
def test_a_writer_may_be_forgotten_after_its_file() -> None:
    file = io.BytesIO()
    writer = ParquetResults(file)
    writer.write([job(0)])
    file.close()
    del writer
    gc.collect()
