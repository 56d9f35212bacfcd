"""What a consumer is given, and what earlier deliveries have left in the message's headers.

RabbitMQ's own count of deliveries would not do: it counts messages that a dying consumer had
fetched and not begun, classic queues have none, and it forgets when and why. So a message that
failed goes back to its queue as a copy, whose headers say how often, when and why.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, Self

from kombu import Message
from pydantic import BaseModel, Field, ValidationError

from visq.types import BatchView, JobView

ENDED: Final = "ConsumerEnded"
"""In place of an exception's class: a consumer was killed, or lost the broker."""
LONGEST_MESSAGE: Final = 1000
"""Characters of an error in a header."""

_DELIVERIES: Final = "x-visq-deliveries"
_FIRST: Final = "x-visq-first-failed-at"
_LAST: Final = "x-visq-last-failed-at"
_ERROR: Final = "x-visq-error"
_MESSAGE: Final = "x-visq-error-message"
_DEAD_FROM: Final = "x-visq-dead-from"
_OURS: Final = frozenset({_DELIVERIES, _FIRST, _LAST, _ERROR, _MESSAGE, _DEAD_FROM})
_BROKERS: Final = frozenset({"redelivered", "x-delivery-count", "x-acquired-count"})
"""Headers that brokers add to a delivery."""


class Failure(BaseModel):
    """How the earlier deliveries of an event ended."""

    deliveries: int
    """Those that ended in an exception, or with the end of the consumer."""
    first_at: datetime
    last_at: datetime
    error: str
    """The class of the last exception; ``ConsumerEnded`` if there was none."""
    message: str

    @classmethod
    def after(cls, earlier: Failure | None, error: str, message: str) -> Self:
        """One more than `earlier`."""
        now = datetime.now(UTC)
        return cls(
            deliveries=1 if earlier is None else earlier.deliveries + 1,
            first_at=now if earlier is None else earlier.first_at,
            last_at=now,
            error=error,
            # No lone surrogates, which an exception's text may have and AMQP may not.
            message=message[:LONGEST_MESSAGE].encode(errors="replace").decode(),
        )

    @classmethod
    def of(cls, message: Message) -> Self | None:
        """What the headers of `message` say."""
        headers = message.headers
        if _DELIVERIES not in headers:
            return None
        try:
            return cls.model_validate(
                {
                    "deliveries": headers[_DELIVERIES],
                    "first_at": headers.get(_FIRST),
                    "last_at": headers.get(_LAST),
                    "error": headers.get(_ERROR),
                    "message": headers.get(_MESSAGE),
                }
            )
        except ValidationError:  # somebody else's
            return None


class Event(BaseModel):
    """That a job or a batch has ended: the CloudEvents 1.0 envelope, and what is in it."""

    id: str
    """The same when the event is delivered or published again."""
    type: str
    """``visq.job.succeeded``, ``.failed``, ``.cancelled`` or ``.expired``; after the jobs of a
    batch, ``visq.batch.completed``, ``.failed``, ``.cancelled`` or ``.expired``."""
    time: datetime
    tenant: str = Field(validation_alias="visqtenant")
    data: JobView | BatchView = Field(discriminator="object")
    failure: Failure | None = None
    """What became of earlier deliveries, of a dead letter too; None if there were none."""

    @property
    def job(self) -> JobView:
        """The job that has ended.

        :raises TypeError: the event is about a batch.
        """
        if isinstance(self.data, BatchView):
            raise TypeError(f"event {self.id} is about batch {self.data.id}: look at `event.batch`")
        return self.data

    @property
    def batch(self) -> BatchView | None:
        """The batch that has ended; ``None``: the event is about a job."""
        return self.data if isinstance(self.data, BatchView) else None


def was_redelivered(message: Message) -> bool:
    """Whether a consumer held it that has not acknowledged it."""
    return bool(message.delivery_info.get("redelivered") or message.headers.get("redelivered"))


def is_dead(message: Message) -> bool:
    """Whether it is a dead letter: its deliveries were those of another queue."""
    return _DEAD_FROM in message.headers


def copy_of(message: Message) -> dict[str, Any]:
    """`message` for ``Producer.publish``: the same body, id and headers."""
    return _copy(message, {name: message.headers[name] for name in _OURS & set(message.headers)})


def fresh_copy_of(message: Message) -> dict[str, Any]:
    """The same as if it had never been delivered."""
    return _copy(message, {})


def failed_copy_of(
    message: Message, failure: Failure, *, dead_from: str | None = None
) -> dict[str, Any]:
    """The same with headers about `failure`; with `dead_from`, a dead letter of that queue."""
    headers = {
        _DELIVERIES: failure.deliveries,
        _FIRST: failure.first_at.isoformat(),
        _LAST: failure.last_at.isoformat(),
        _ERROR: failure.error,
        _MESSAGE: failure.message,
    }
    if dead_from is not None:
        headers[_DEAD_FROM] = dead_from
    return _copy(message, headers)


def _copy(message: Message, ours: dict[str, Any]) -> dict[str, Any]:
    theirs = {
        name: value
        for name, value in message.headers.items()
        if name not in _OURS and name not in _BROKERS
    }
    return {
        "body": message.body,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "delivery_mode": 2,
        "message_id": message.properties.get("message_id"),
        "headers": theirs | ours,
    }
