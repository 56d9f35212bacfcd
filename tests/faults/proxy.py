"""A TCP proxy in front of a server of a test, that breaks the network on demand::

    with Proxy(postgres.port) as proxy:
        database = Database(url_through(url, proxy.port))
        proxy.stall()                        # a partition: nothing flows, nobody is told
        proxy.heal()                         # what was held flows on
        proxy.cut()                          # resets all connections, refuses new ones
        proxy.heal()
        proxy.drop_after(b"COMMIT")          # the server gets it, its answer never comes

It is a thread of its own; each method returns when the fault is in force.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Direction = Literal["to_server", "to_client"]


def url_through(url: str, port: int) -> str:
    """`url` of a server on loopback, by way of the proxy on `port`."""
    return re.sub(r"(127\.0\.0\.1|localhost):\d+", f"127.0.0.1:{port}", url)


@dataclass
class _Trap:
    pattern: bytes
    direction: Direction
    passed_on: bool
    times: float
    after: bytes
    armed: set[asyncio.StreamWriter] = field(default_factory=set)
    """Clients that have sent `after`."""


class Proxy:
    """Passes connections to `port` on to `target_port` of loopback, until a fault is asked for."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._reserved = _bound(0)  # never listens: keeps the port while connections are refused
        self.port: int = self._reserved.getsockname()[1]
        self.struck = 0
        """How often `drop_after` has reset a connection."""
        self._trap: _Trap | None = None
        self._delay = 0.0
        self._flowing = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        self._within(self._cut)
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    def cut(self) -> None:
        """Reset all connections and refuse new ones."""
        self._within(self._cut)

    def stall(self) -> None:
        """Hold all bytes and all ends of connections, both ways; new connections get no answer."""
        self._within(self._flowing.clear)

    def delay(self, seconds: float) -> None:
        """Hold each piece for so long, both ways."""
        self._within(setattr, self, "_delay", seconds)

    def drop_after(
        self,
        pattern: bytes,
        direction: Direction = "to_server",
        *,
        passed_on: bool = True,
        times: float = 1,
        after: bytes = b"",
    ) -> None:
        """Reset the client's connection at the next piece that has `pattern` in it, `times` times
        (`math.inf`: until `heal`).

        :param passed_on: whether the piece still arrives. A server then acts on it, and finds its
            client gone. `COMMIT` in the direction ``to_client``, not passed on, is a commit that
            has certainly been made.
        :param after: strike only a connection on which this has gone to the server before, from
            now on: ``DELETE FROM outbox`` picks the transaction whose `COMMIT` is meant.
        """
        trap = _Trap(pattern, direction, passed_on, times, after)
        self._within(setattr, self, "_trap", trap)

    def heal(self) -> None:
        """End all faults."""
        asyncio.run_coroutine_threadsafe(self._heal(), self._loop).result(10)

    def _within(self, change: Callable[..., object], *args: Any) -> None:
        async def run() -> None:
            change(*args)

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _heal(self) -> None:
        self._trap, self._delay = None, 0.0
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, sock=_bound(self.port))

    def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            _reset(writer)

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        both = [client]
        self._writers.add(client)
        try:
            await self._flowing.wait()
            answers, server = await asyncio.open_connection("127.0.0.1", self._target)
            both.append(server)
            self._writers.add(server)
            await asyncio.gather(
                self._pass(reader, server, client, "to_server"),
                self._pass(answers, client, client, "to_client"),
            )
        except (OSError, asyncio.CancelledError):
            pass  # one side has gone, or is to go: both do
        finally:
            for writer in both:
                self._writers.discard(writer)
                _reset(writer)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
        direction: Direction,
    ) -> None:
        before = b""
        while True:
            try:
                piece = await reader.read(65536)
            except OSError:
                await self._flowing.wait()  # a partition hides this as well
                raise
            await asyncio.sleep(self._delay)
            await self._flowing.wait()
            if not piece:
                break
            springs, passed_on = self._springs(client, direction, before, piece)
            before = piece
            if passed_on and not writer.is_closing():
                writer.write(piece)
                await writer.drain()
            if springs and not (passed_on and direction == "to_server"):
                raise ConnectionResetError
            if springs:
                # No reset for the server: it might lose what it has not read yet.
                _reset(client)
                break
        if not writer.is_closing():
            writer.write_eof()

    def _springs(
        self, client: asyncio.StreamWriter, direction: Direction, before: bytes, piece: bytes
    ) -> tuple[bool, bool]:
        """Whether the trap strikes here, and whether the piece is passed on."""
        trap = self._trap
        if trap is None:
            return False, True
        if direction == "to_server" and _has(trap.after, before, piece):
            trap.armed.add(client)
        if direction != trap.direction or client not in trap.armed:
            return False, True
        if not _has(trap.pattern, before, piece):
            return False, True
        self.struck += 1
        trap.times -= 1
        if trap.times < 1:
            self._trap = None
        return True, trap.passed_on


def _has(pattern: bytes, before: bytes, piece: bytes) -> bool:
    """Whether `pattern` ends in `piece`; it may have begun in the piece before."""
    return pattern in before[max(0, len(before) - len(pattern) + 1) :] + piece


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _reset(writer: asyncio.StreamWriter) -> None:
    if not writer.is_closing():
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
