"""The output of ``visq batch run``: one line for each item, in input order, as they come.

What was written before an interruption stays, and is gone on from: a line says which item of which
batch it is. A line that was cut off is written again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from visq.errors import InvalidRequest
from visq.types import JobView


class _Line(BaseModel):
    batch_id: str
    position: int


def last_position(path: Path, batch_id: str) -> int | None:
    """Position of the last item in the file, after which it is cut; ``None``: there is none.

    :raises InvalidRequest: the file is that of another batch, or something else.
    """
    if not path.exists():
        return None
    last: bytes | None = None
    size = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            last = line
            size += len(line)
        if last is not None:
            found = _read(last, path)
            if found.batch_id != batch_id:
                raise InvalidRequest(f"{path} holds results of {found.batch_id}, not {batch_id}")
        elif path.stat().st_size and not line.startswith(b'{"id":"job_'):
            raise InvalidRequest(f"{path} is no output of a batch")
        file.truncate(size)
    return None if last is None else found.position


def append(path: Path, jobs: Iterable[JobView], *, fresh: bool) -> None:
    """Write results as they come; `fresh`: in place of what is there."""
    with path.open("wb" if fresh else "ab") as file:
        for job in jobs:
            file.write(job.model_dump_json().encode() + b"\n")
            file.flush()  # who interrupts this has all that came


def _read(line: bytes, path: Path) -> _Line:
    try:
        return _Line.model_validate_json(line)
    except ValidationError:
        raise InvalidRequest(f"{path} is no output of a batch") from None
