"""The proxy that breaks the network in the tests of faults, itself tested."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.faults.proxy import Proxy, url_through
from tests.waiting import until


class Echo:
    """A server that sends back what it gets, and keeps it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.received = b""
        self.clients = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.clients += 1
                threading.Thread(target=self._answer, args=[client], daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            while data := client.recv(1 << 16):
                self.received += data
                client.sendall(data)
        self.clients -= 1

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def says(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text)
    return client.recv(1 << 16)


def test_it_passes_everything_on(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as client:
        text = b"0123456789" * 100_000
        sender = threading.Thread(target=client.sendall, args=[text])
        sender.start()
        got = b""
        while len(got) < len(text):
            got += client.recv(1 << 16)
        sender.join()
        assert got == text
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    until(lambda: echo.clients == 0, 5, "the end of the connection at the server")


def test_a_cut_resets_all_and_refuses_new_connections_until_it_is_healed(
    proxy: Proxy, echo: Echo
) -> None:
    with connect(proxy) as client:
        assert says(client, b"one") == b"one"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(10)
    until(lambda: echo.clients == 0, 5, "the end of the connection at the server")
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as client:
        assert says(client, b"two") == b"two"


def test_while_it_stalls_nothing_flows_and_nobody_is_told(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as client, connect(proxy) as leaving:
        assert says(client, b"one") == b"one"
        assert says(leaving, b"-") == b"-"
        proxy.stall()
        client.settimeout(0.2)
        client.sendall(b"two")
        with pytest.raises(TimeoutError):
            client.recv(10)
        with connect(proxy) as late:
            late.settimeout(0.2)
            late.sendall(b"three")
            with pytest.raises(TimeoutError):
                late.recv(10)
            leaving.close()
            assert echo.received == b"one-"
            assert echo.clients == 2
            proxy.heal()
            assert client.recv(10) == b"two"
            assert late.recv(10) == b"three"
        until(lambda: echo.clients == 1, 5, "the server to be told of who has left")


@pytest.mark.parametrize("passed_on", [True, False])
def test_a_connection_is_reset_at_a_pattern(proxy: Proxy, echo: Echo, passed_on: bool) -> None:
    with connect(proxy) as client:
        assert says(client, b"a COMMIT before") == b"a COMMIT before"
        proxy.drop_after(b"COMMIT", passed_on=passed_on)
        assert says(client, b"harmless") == b"harmless"
        with pytest.raises(ConnectionResetError):
            says(client, b"here: COMMIT!")
    until(lambda: echo.clients == 0, 5, "the end of the connection at the server")
    assert echo.received.endswith(b"harmless" + b"here: COMMIT!" * passed_on)
    assert proxy.struck == 1
    with connect(proxy) as client:
        assert says(client, b"COMMIT") == b"COMMIT"


def test_a_pattern_in_two_pieces_is_found(proxy: Proxy) -> None:
    proxy.drop_after(b"COMMIT", times=2)
    for _ in range(2):
        with connect(proxy) as client:
            assert says(client, b"a COM") == b"a COM"
            with pytest.raises(ConnectionResetError):
                says(client, b"MIT")
    assert proxy.struck == 2


def test_only_the_connection_that_said_something_before_is_struck(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        assert says(one, b"DELETE") == b"DELETE"
        proxy.drop_after(b"COMMIT", after=b"DELETE")
        assert says(one, b"COMMIT") == b"COMMIT"  # that was before
        assert says(one, b"DELETE") == b"DELETE"
        assert says(other, b"COMMIT") == b"COMMIT"
        with pytest.raises(ConnectionResetError):
            says(one, b"COMMIT")
    assert proxy.struck == 1


def test_an_answer_is_dropped(proxy: Proxy, echo: Echo) -> None:
    proxy.drop_after(b"COMMIT", "to_client", passed_on=False)
    with connect(proxy) as client, pytest.raises(ConnectionResetError):
        says(client, b"COMMIT")
    assert echo.received == b"COMMIT"


def test_pieces_are_delayed(proxy: Proxy) -> None:
    with connect(proxy) as client:
        client.settimeout(0.1)
        proxy.delay(0.2)
        with pytest.raises(TimeoutError):
            says(client, b"slow")
        client.settimeout(5)
        assert client.recv(10) == b"slow"


def test_a_server_that_is_away_ends_the_connection() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with Proxy(nobody.getsockname()[1]) as proxy, pytest.raises(ConnectionResetError):
            connect(proxy).recv(10)


def test_a_url_is_led_through_it() -> None:
    url = "postgresql+psycopg://postgres@127.0.0.1:5432/visq"
    assert url_through(url, 99) == "postgresql+psycopg://postgres@127.0.0.1:99/visq"
    assert url_through("redis://localhost:6379/0", 99) == "redis://127.0.0.1:99/0"
