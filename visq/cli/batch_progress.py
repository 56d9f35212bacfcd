"""How far a batch is, as a bar that moves: items, items/s, tokens/s, time to its end, failures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from visq.cli.client_common import coloured
from visq.cli.console import errors
from visq.types import BatchView

if TYPE_CHECKING:
    from visq.client import Batch

WINDOW_SECONDS: Final = 30.0
"""Speeds are means over so long."""


class Pace:
    """How fast a batch is, from what is seen of it now and then."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()

    def see(self, view: BatchView, now: float) -> None:
        last = (view.counts.finished, view.usage.output_tokens)
        self._seen.append((now, *last))
        while self._seen[0][0] < now - WINDOW_SECONDS and len(self._seen) > 2:
            self._seen.popleft()

    def per_second(self) -> tuple[float, float]:
        """Items, and generated tokens."""
        start, items, tokens = self._seen[0]
        end, items_now, tokens_now = self._seen[-1]
        seconds = max(end - start, 1e-3)
        return (items_now - items) / seconds, (tokens_now - tokens) / seconds

    def describe(self, view: BatchView) -> str:
        items, tokens = self.per_second()
        counts = view.counts
        more = "" if view.intake_done else "+"  # its file is still being read
        said = [f"{counts.finished}/{counts.total}{more}", f"{items:.1f} items/s"]
        said.append(f"{tokens:.0f} tokens/s")
        left = counts.total - counts.finished
        if items > 0 and left and view.intake_done:
            said.append(f"{_clock(left / items)} left")
        wrong = counts.failed + counts.expired + counts.cancelled
        said.append(f"{wrong} failed")
        return "  ".join(said)


class _PaceColumn(ProgressColumn):
    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self._batch = batch
        self._pace = Pace()

    def render(self, task: Task) -> Text:
        view = self._batch.view
        self._pace.see(view, time.monotonic())
        return Text(self._pace.describe(view))


class _BatchBar(BarColumn):
    """The bar follows what is known of the batch, not what is told to the task."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self._batch = batch

    def render(self, task: Task) -> ProgressBar:
        task.completed = self._batch.counts.finished
        task.total = self._batch.counts.total or None
        return super().render(task)


@contextmanager
def followed(batch: Batch) -> Iterator[None]:
    """A progress bar of `batch.view`, which others keep fresh. Only on a terminal."""
    columns = (_BatchBar(batch), _PaceColumn(batch), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, refresh_per_second=4) as progress:
        progress.add_task(batch.id, total=None)
        yield


def all_succeeded(view: BatchView) -> bool:
    return view.errors is None and view.counts.succeeded == view.counts.total


def summary(view: BatchView) -> str:
    """An ended batch in a line."""
    counts = view.counts
    said = [f"{counts.succeeded} of {counts.total} succeeded"]
    for name in ("failed", "cancelled", "expired"):
        if number := getattr(counts, name):
            said.append(f"{number} {name}")
    reasons = [escape(error.message) for error in view.errors.data] if view.errors else []
    return f"{view.id} is {coloured(view.status)}: {'; '.join([', '.join(said), *reasons])}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
