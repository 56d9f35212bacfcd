"""The Valkey server from the wheel keeps what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from visq.embedded.valkey import Valkey
from visq.errors import Unavailable


def test_what_it_holds_survives_a_stop_and_a_kill(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("stopped", "kept")
        server.restart()
        assert client.get("stopped") == b"kept"
        client.set("killed", "kept")
        server.kill()
        assert not server.alive
        server.restart()
        assert client.get("killed") == b"kept"


def test_it_can_come_back_without_its_data_on_the_same_port(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("name", "value")
        server.kill()
        server.restart(keep_data=False)
        assert client.get("name") is None


def test_it_never_drops_messages_for_want_of_memory(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}


def test_two_servers_share_nothing(tmp_path: Path) -> None:
    with Valkey(tmp_path / "a") as first, Valkey(tmp_path / "b") as second:
        assert first.port != second.port


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with Valkey(tmp_path / "a") as first:
        second = Valkey(tmp_path / "b")
        second.command = [*second.command, "--port", str(first.port)]
        with pytest.raises(Unavailable, match="Address already in use"):
            second.start()
