"""A channel of kombu has one Redis client, and a new one when it has a new pool."""

from __future__ import annotations

from kombu import Connection, Queue

from worker.queue import broker_clients


def test_a_channel_keeps_its_client_until_its_pool_is_another(redis_url: str) -> None:
    broker_clients.install()
    broker_clients.install()
    with Connection(redis_url) as connection:
        channel = connection.channel()
        with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
            assert first is second
            assert first is not channel.client
        channel._disconnect_pools()
        with channel.conn_or_acquire() as later:
            assert later is not first
            assert later.ping()


def test_messages_go_and_are_acknowledged_as_ever(redis_url: str) -> None:
    broker_clients.install()
    with Connection(redis_url) as connection:
        queue = Queue("a-queue")(connection.default_channel)
        queue.declare()
        with connection.Producer() as producer:
            producer.publish({"n": 1}, routing_key="a-queue")
        message = queue.get()
        assert message is not None
        assert message.payload == {"n": 1}
        message.ack()
        assert queue.get() is None
        with connection.channel().conn_or_acquire() as client:
            assert client.keys("unacked*") == []
