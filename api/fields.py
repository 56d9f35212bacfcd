"""Parameters that several routes have in common: ids, headers, pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, TypeVar

from fastapi import Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from visq.types import Page

RowT = TypeVar("RowT")
ViewT = TypeVar("ViewT", bound=BaseModel)

MAX_WAIT_SECONDS: Final = 60
MAX_PAGE: Final = 100


def _id_pattern(prefix: str) -> str:
    return f"^{prefix}_[0-9a-f]{{32}}$"


def _id_path(prefix: str) -> Any:
    return Path(
        pattern=_id_pattern(prefix), examples=[f"{prefix}_0197f2a4c1d87cc2a1b2c3d4e5f60718"]
    )


JobId = Annotated[str, _id_path("job")]
SessionIdPath = Annotated[str, _id_path("ses")]
BatchIdPath = Annotated[str, _id_path("bat")]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]+$",
        description="A repeat of the same request with the same key answers with what the first "
        "one made, and makes nothing. The same key with another body is a 409.",
        examples=["order-7451-picture-2"],
    ),
]

Prefer = Annotated[
    str | None,
    Header(
        alias="Prefer",
        description=f"`wait=N`: answer when the job has ended, but after N seconds at the latest "
        f"(up to {MAX_WAIT_SECONDS}). Other preferences are ignored.",
        examples=["wait=30"],
    ),
]

_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=$|[,;])", re.IGNORECASE)


def wait_of(prefer: str | None) -> int | None:
    """Seconds of ``Prefer: wait=N``, cut to what this API waits; ``None`` if it is not asked."""
    found = _WAIT.search(prefer or "")
    return min(int(found[1]), MAX_WAIT_SECONDS) if found else None


class Parameters(BaseModel):
    """Base of query parameters: unknown ones are errors, as a misspelt filter filters nothing."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class PageParameters(Parameters):
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 20
    """Most entries on the page."""


class NewestFirst(PageParameters):
    cursor: Annotated[str, Field(pattern="^[a-z]{3}_[0-9a-f]{32}$")] | None = None
    """`next_cursor` of the page before."""


Paged = Annotated[NewestFirst, Query()]


def page_of(
    rows: Sequence[RowT],
    limit: int,
    view: Callable[[RowT], ViewT],
    cursor: Callable[[RowT], str],
) -> Page[ViewT]:
    """A page of `limit` from rows that were read with ``limit + 1``."""
    shown = rows[:limit]
    more = len(rows) > limit
    return Page[Any](
        data=[view(row) for row in shown], next_cursor=cursor(shown[-1]) if more else None
    )
