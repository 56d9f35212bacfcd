"""A batch's event stream, as both clients read it, without any I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visq.client.streaming import ServerSentEvent
from visq.types import BatchView, JobView


@dataclass(frozen=True)
class BatchEvent:
    """What happened in a batch."""

    type: Literal["item", "progress", "end"]
    job: JobView | None = None
    """`item`: the item that has ended."""
    cursor: str | None = None
    """`item`: the number of that end; a stream (or `run`) can go on `after` it."""
    batch: BatchView | None = None
    """`progress` and `end`: its present state."""


class BatchFeed:
    """Where a stream is, over reconnections."""

    def __init__(self, after: str | None) -> None:
        self.last_event_id = after
        self.ended = False

    def feed(self, event: ServerSentEvent) -> BatchEvent | None:
        """The event; ``None``: it is of a kind that a later version has."""
        match event.event:
            case "item":
                self.last_event_id = event.id
                job = JobView.model_validate_json(event.data)
                return BatchEvent("item", job=job, cursor=event.id)
            case "progress":
                return BatchEvent("progress", batch=BatchView.model_validate_json(event.data))
            case "end":
                self.ended = True
                return BatchEvent("end", batch=BatchView.model_validate_json(event.data))
        return None
