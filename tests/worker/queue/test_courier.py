"""Publishing result events: none is lost, and none holds up the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Queue
from sqlalchemy import select
from sqlalchemy.orm import Session

from migrations import run as migrations
from models.database import Database
from models.outbox import OutboxEntry
from models.tables import Outbox
from tests.servers import RabbitMQ
from visq.errors import Unavailable
from visq.settings import Settings
from worker.queue import Courier


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    migrations.upgrade(sqlite_url)
    database = Database(sqlite_url)
    yield database
    database.close()


def courier_for(database: Database, broker_url: str, redis_url: str, folder: Path) -> Courier:
    return Courier(Settings(data=folder, broker_url=broker_url, redis_url=redis_url), database)


def left_in_the_outbox(database: Database, *numbers: int) -> list[OutboxEntry]:
    """Entries with these numbers, as an ended job leaves them."""

    def add(session: Session) -> None:
        for number in numbers:
            entry = event(number)
            session.add(Outbox(id=entry.id, kind="result", payload=entry.payload))

    database.run(add)
    return [event(number) for number in numbers]


def event(number: int) -> OutboxEntry:
    data = {
        "id": f"job_{number}",
        "attempt": 1,
        "kind": "chat",
        "status": "succeeded",
        "result_queue": "mine",
    }
    payload: dict[str, Any] = {"id": f"evt_{number}", "visqtenant": "acme", "data": data}
    return OutboxEntry(payload["id"], "result", payload)


def remaining(database: Database) -> list[str]:
    return list(
        database.read(lambda session: session.scalars(select(Outbox.id).order_by(Outbox.id)).all())
    )


def test_an_event_that_is_refused_stays_and_does_not_hold_up_the_others(
    database: Database, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier = courier_for(database, redis_url, redis_url, tmp_path)
    publish = courier.broker.publish_result

    def refuse_one(payload: dict[str, Any]) -> None:
        if payload["id"] == "evt_2":
            raise Unavailable("the broker refuses this one")
        publish(payload)

    monkeypatch.setattr(courier.broker, "publish_result", refuse_one)
    with pytest.raises(Unavailable):
        courier.publish_events(left_in_the_outbox(database, 1, 2, 3))
    assert remaining(database) == ["evt_2"]
    courier.close()


def test_a_result_queue_that_its_consumer_made_in_another_form_gets_its_results(
    database: Database, redis_url: str, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    courier = courier_for(database, rabbitmq.url, redis_url, tmp_path)
    with Connection(rabbitmq.url) as connection:
        queue = Queue(
            "visq.results.acme.mine", durable=True, queue_arguments={"x-queue-type": "quorum"}
        )(connection.default_channel)
        queue.declare()
        courier.publish_events(left_in_the_outbox(database, *range(6)))
        ids = []
        while (message := queue.get()) is not None:
            ids.append(message.properties["message_id"])
            message.ack()
        queue.delete()
    assert ids == [f"evt_{number}" for number in range(6)]
    assert remaining(database) == []
    courier.close()
