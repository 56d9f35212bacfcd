"""Publishing result events: none is lost, and none holds up the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from migrations import run as migrations
from models.database import Database, db_now
from models.outbox import OutboxEntry
from models.tables import Outbox
from tests.servers import RabbitMQ
from visq.cloudevents import RESULTS_EXCHANGE
from visq.errors import Unavailable
from visq.settings import Settings
from worker.queue import Courier, Maintenance
from worker.queue.courier import AT_ONCE_SECONDS


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    migrations.upgrade(sqlite_url)
    database = Database(sqlite_url)
    yield database
    database.close()


def courier_for(database: Database, broker_url: str, redis_url: str, folder: Path) -> Courier:
    return Courier(Settings(data=folder, broker_url=broker_url, redis_url=redis_url), database)


def left_in_the_outbox(database: Database, *entries: OutboxEntry) -> list[OutboxEntry]:
    """As ended jobs leave them."""

    def add(session: Session) -> None:
        for entry in entries:
            session.add(Outbox(id=entry.id, kind="result", payload=entry.payload))

    database.run(add)
    return list(entries)


def event(number: int, tenant: str = "acme", queue: str | None = "mine") -> OutboxEntry:
    data = {
        "id": f"job_{number}",
        "attempt": 1,
        "kind": "chat",
        "status": "succeeded",
        "result_queue": queue,
    }
    payload: dict[str, Any] = {"id": f"evt_{number}", "visqtenant": tenant, "data": data}
    return OutboxEntry(payload["id"], "result", payload)


def remaining(database: Database) -> list[str]:
    return list(
        database.read(lambda session: session.scalars(select(Outbox.id).order_by(Outbox.id)).all())
    )


def due_in(database: Database) -> dict[str, float]:
    """Seconds until each entry is due again."""
    now = select(db_now()).scalar_subquery()
    rows = database.read(
        lambda session: session.execute(select(Outbox.id, Outbox.available_at, now)).all()
    )
    return {id_: (at - now).total_seconds() for id_, at, now in rows}


def all_due(database: Database) -> None:
    """Time passes."""
    database.run(lambda session: session.execute(update(Outbox).values(available_at=db_now(-1.0))))


def counted(courier: Courier, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the events that the broker is asked to take from now on."""
    asked: list[str] = []
    publish = courier.broker.publish_result

    def count(payload: dict[str, Any], **options: Any) -> None:
        asked.append(payload["id"])
        publish(payload, **options)

    monkeypatch.setattr(courier.broker, "publish_result", count)
    return asked


def ids_in(queue: Queue) -> list[str]:
    ids = []
    while (message := queue.get()) is not None:
        ids.append(message.properties["message_id"])
        message.ack()
    return ids


FULL = {"x-max-length": 1, "x-overflow": "reject-publish"}


def test_a_full_result_queue_of_one_tenant_holds_up_nobody_else_and_doubles_nothing(
    database: Database,
    redis_url: str,
    rabbitmq: RabbitMQ,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = rabbitmq.create_virtual_host()
    courier = courier_for(database, url, redis_url, tmp_path)
    maintenance = Maintenance(courier._settings, database, courier)
    asked = counted(courier, monkeypatch)
    with Connection(url) as connection:
        channel = connection.default_channel
        full = Queue("visq.results.acme.full", durable=True, queue_arguments=FULL)(channel)
        exchange = Exchange(RESULTS_EXCHANGE, type="topic", durable=True)
        topics = Queue("all", exchange, routing_key="#", durable=True)(channel)
        for queue in (full, topics):
            queue.declare()
        refused = [event(number, queue="full") for number in range(4)]
        others = [event(number, "beta", "open") for number in (4, 5)] + [event(6, queue=None)]
        left_in_the_outbox(database, *refused, *others)

        maintenance.publish_events()
        assert asked == ["evt_0", "evt_1", "evt_4", "evt_5", "evt_6"]
        assert remaining(database) == ["evt_1", "evt_2", "evt_3"]
        assert ids_in(Queue("visq.results.beta.open")(channel)) == ["evt_4", "evt_5"]
        assert all(0 < seconds < 6 for seconds in due_in(database).values())

        all_due(database)
        asked.clear()
        maintenance.publish_events()
        assert asked == [], "the queue rests"
        assert ids_in(topics) == ["evt_0", "evt_4", "evt_5", "evt_6"]

        # Another process has not seen it rest; its consumer has taken one event meanwhile.
        assert ids_in(full) == ["evt_0"]
        all_due(database)
        other = courier_for(database, url, redis_url, tmp_path)
        Maintenance(other._settings, database, other).publish_events()
        assert ids_in(full) == ids_in(topics) == ["evt_1"]
        assert remaining(database) == ["evt_2", "evt_3"]
        other.close()
    courier.close()


def test_a_full_queue_that_a_tenant_has_bound_to_the_exchange_holds_up_no_other_tenant(
    database: Database, redis_url: str, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    """RabbitMQ refuses the publication then, although other queues take it."""
    url = rabbitmq.create_virtual_host()
    courier = courier_for(database, url, redis_url, tmp_path)
    with Connection(url) as connection:
        exchange = Exchange(RESULTS_EXCHANGE, type="topic", durable=True)
        Queue("hers", exchange, routing_key="acme.#", durable=True, queue_arguments=FULL)(
            connection.default_channel
        ).declare()
        entries = [event(number, queue=None) for number in range(4)]
        courier.publish_events(left_in_the_outbox(database, *entries, event(4, "beta", "open")))
    assert remaining(database) == ["evt_1", "evt_2", "evt_3"]
    courier.close()


def test_a_queue_that_never_confirms_costs_a_worker_one_short_wait_and_the_loop_few(
    database: Database, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier = courier_for(database, redis_url, redis_url, tmp_path)
    waits: list[float] = []

    def silent(channel: Any, name: str, *, confirm_seconds: float, **message: Any) -> None:
        if name.endswith("silent"):
            waits.append(confirm_seconds)
            raise TimeoutError

    monkeypatch.setattr("worker.queue.broker.send", silent)
    stuck = [event(number, queue="silent") for number in range(5)]
    courier.publish_events(left_in_the_outbox(database, *stuck, event(5)))
    courier.publish_events(left_in_the_outbox(database, event(6, queue="silent"), event(7)))
    assert waits == [AT_ONCE_SECONDS]
    assert remaining(database) == ["evt_0", "evt_1", "evt_2", "evt_3", "evt_4", "evt_6"]
    courier.close()


def test_a_call_ends_in_time_and_what_it_has_not_tried_is_due_at_once(
    database: Database, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier = courier_for(database, redis_url, redis_url, tmp_path)
    asked = counted(courier, monkeypatch)
    courier.publish_events(left_in_the_outbox(database, event(1), event(2)), seconds=0.0)
    assert asked == []
    assert all(seconds <= 0 for seconds in due_in(database).values())
    assert len(due_in(database)) == 2
    courier.close()


def test_a_broker_that_is_away_ends_the_call_and_one_broken_connection_does_not(
    database: Database, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier = courier_for(database, redis_url, redis_url, tmp_path)
    publish = courier.broker.publish_result
    asked: list[str] = []

    def break_some(payload: dict[str, Any], **options: Any) -> None:
        asked.append(payload["id"])
        if payload["id"] in ("evt_1", "evt_3", "evt_4"):
            raise Unavailable("the broker does not answer")
        publish(payload, **options)

    monkeypatch.setattr(courier.broker, "publish_result", break_some)
    with pytest.raises(Unavailable):
        courier.publish_events(left_in_the_outbox(database, *map(event, range(6))))
    assert asked == ["evt_0", "evt_1", "evt_2", "evt_3", "evt_4"]
    assert remaining(database) == ["evt_1", "evt_3", "evt_4", "evt_5"]
    assert due_in(database)["evt_5"] <= 0 < due_in(database)["evt_4"] < 3
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
        courier.publish_events(left_in_the_outbox(database, *map(event, range(6))))
        ids = ids_in(queue)
        queue.delete()
    assert ids == [f"evt_{number}" for number in range(6)]
    assert remaining(database) == []
    courier.close()
