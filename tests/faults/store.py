"""An S3 endpoint that lies: a proxy before a real one, which passes on what it gets and misbehaves
when a test asks it to, by object or by chance::

    with LyingStore(s3) as store:
        store.lie(Refuse(503, "SlowDown"), "pictures/cat.png", times=2)
        store.lie(Slow(between=10.0), "slow-bucket/")
        store.lie_at_random([Refuse(), Truncate(), Reset(), Silence()], share=0.1, seed=7)
        ... Settings from store.environment ...
        store.heal()

It runs in threads of the test's process. By chance, the n-th request for an object meets the same
fault in every run with the same seed, however the requests interleave.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from tests.servers import S3Endpoint

_NOT_PASSED_ON = {
    "connection",
    "content-length",
    "transfer-encoding",
    "keep-alive",
    "date",
    "server",
}
_CHUNK = 64 * 1024


@dataclass
class Answer:
    """What the real endpoint said, and the way to whoever asked."""

    handler: BaseHTTPRequestHandler
    released: threading.Event
    """Set when the store heals: nobody waits any longer."""
    status: int
    headers: dict[str, str]
    body: bytes
    bodiless: int | None = None
    """Of an answer to HEAD: the length that it announces."""

    def pass_on(self) -> None:
        self.write_head(len(self.body) if self.bodiless is None else self.bodiless)
        self.handler.wfile.write(self.body)

    def head(self, length: int) -> bytes:
        """Status line and headers, announcing a body of `length` bytes."""
        given = {**self.headers, "Content-Length": str(length)}
        lines = [f"HTTP/1.1 {self.status} said", *(f"{name}: {given[name]}" for name in given)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def write_head(self, length: int) -> None:
        self.handler.wfile.write(self.head(length))

    def trickle(self, data: bytes, piece: int, between: float) -> None:
        """Send `data` in pieces, `between` seconds apart."""
        for start in range(0, len(data), piece):
            if self.released.wait(between):
                self.handler.wfile.write(data[start:])
                return
            self.handler.wfile.write(data[start : start + piece])

    def close(self) -> None:
        """Let nothing follow on this connection."""
        self.handler.close_connection = True

    def reset(self) -> None:
        """End the connection by RST in place of FIN."""
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()


class Fault(Protocol):
    """A way to misbehave."""

    def __call__(self, answer: Answer) -> None:
        """Send something other than the `answer`, or send it in another way."""


@dataclass(frozen=True)
class Slow:
    """The whole answer, but slowly."""

    first_byte: float = 0.0
    """Seconds before anything comes."""
    between: float = 0.0
    """Seconds between two pieces of the body."""
    piece: int = 1
    """Bytes."""
    headers: bool = False
    """Whether the headers trickle as well."""

    def __call__(self, answer: Answer) -> None:
        answer.released.wait(self.first_byte)
        head = answer.head(len(answer.body))
        if self.headers:
            answer.trickle(head + answer.body, self.piece, self.between)
        else:
            answer.handler.wfile.write(head)
            answer.trickle(answer.body, self.piece, self.between)


@dataclass(frozen=True)
class Refuse:
    """An error in place of the object."""

    status: int = 503
    code: str = "SlowDown"

    def __call__(self, answer: Answer) -> None:
        text = f"<Error><Code>{self.code}</Code><Message>a lie</Message></Error>".encode()
        answer.status, answer.headers, answer.body = self.status, {}, text
        answer.pass_on()


@dataclass(frozen=True)
class Unheard(Refuse):
    """An error, and the real endpoint never gets the request."""

    code: str = "InternalError"


@dataclass(frozen=True)
class Truncate:
    """Part of the body, of which all was announced; then the connection ends."""

    share: float = 0.5
    then: Callable[[], object] | None = None
    """Done after the part is sent, and before the connection ends."""

    def __call__(self, answer: Answer) -> None:
        answer.write_head(len(answer.body))
        answer.handler.wfile.write(answer.body[: int(len(answer.body) * self.share)])
        if self.then is not None:
            self.then()
        answer.close()


@dataclass(frozen=True)
class Shorten:
    """Part of the body as if it were all of it, under another ETag."""

    share: float = 0.5
    etag: str = '"of-a-part"'

    def __call__(self, answer: Answer) -> None:
        answer.headers["ETag"] = self.etag
        answer.body = answer.body[: int(len(answer.body) * self.share)]
        answer.pass_on()


@dataclass(frozen=True)
class WrongETag:
    """The object under an ETag that it does not have."""

    etag: str = '"of-something-else"'

    def __call__(self, answer: Answer) -> None:
        answer.headers["ETag"] = self.etag
        answer.pass_on()


@dataclass(frozen=True)
class Then:
    """The right answer; after it, something happens to the store."""

    action: Callable[[], object]

    def __call__(self, answer: Answer) -> None:
        answer.pass_on()
        self.action()


@dataclass(frozen=True)
class Reset:
    """The connection is reset, before the answer or in the middle of it."""

    share: float | None = None
    """Of the body that is sent before; ``None``: not even the headers."""

    def __call__(self, answer: Answer) -> None:
        if self.share is not None:
            answer.write_head(len(answer.body))
            answer.handler.wfile.write(answer.body[: int(len(answer.body) * self.share)])
        answer.reset()


@dataclass(frozen=True)
class Silence:
    """No answer at all, until the store heals."""

    def __call__(self, answer: Answer) -> None:
        answer.released.wait()
        answer.close()


@dataclass
class _Lie:
    fault: Fault
    of: str
    left: int | None
    method: str

    def matches(self, method: str, path: str) -> bool:
        if self.left == 0 or method != self.method:
            return False
        return path.startswith(self.of) if self.of.endswith("/") or not self.of else path == self.of


@dataclass(frozen=True)
class _Chance:
    faults: Sequence[Fault]
    share: float
    seed: int

    def of(self, path: str, number: int) -> Fault | None:
        chance = random.Random(f"{self.seed} {path} {number}")
        return chance.choice(self.faults) if chance.random() < self.share else None


@dataclass
class Asked:
    """A request that came."""

    method: str
    path: str
    """``bucket/key``."""
    fault: Fault | None
    headers: dict[str, str] = field(repr=False)


class LyingStore:
    """The proxy; ``environment`` and ``url`` are like those of `S3Endpoint`."""

    def __init__(self, upstream: S3Endpoint) -> None:
        self._upstream = upstream
        self._lock = threading.Lock()
        self._lies: list[_Lie] = []
        self._chance: _Chance | None = None
        self._numbers: Counter[str] = Counter()
        self._released = threading.Event()
        self.requests: list[Asked] = []
        """All that came, in order."""
        self.inside: Counter[str] = Counter()
        """By path: requests that are not answered yet."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                owner._serve(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: tests print enough."""

        self._server = _Server(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Settings that make visq use it."""
        return {**self._upstream.environment, "VISQ_S3_ENDPOINT_URL": self.url}

    def lie(
        self, fault: Fault, of: str = "", *, times: int | None = None, method: str = "GET"
    ) -> None:
        """Misbehave at requests for an object (``bucket/key``), a bucket (``bucket/``) or anything.

        :param times: so often, then no longer; ``None``: until `heal`. Of several lies that fit,
            the first one that is not used up is told.
        """
        with self._lock:
            self._lies.append(_Lie(fault, of, times, method))

    def lie_at_random(self, faults: Sequence[Fault], *, share: float, seed: int) -> None:
        """Misbehave at `share` of all reads of objects, until `heal`."""
        with self._lock:
            self._chance = _Chance(faults, share, seed)

    def heal(self) -> None:
        """Tell the truth from now on, also to those who wait."""
        with self._lock:
            self._lies.clear()
            self._chance = None
            released, self._released = self._released, threading.Event()
        released.set()

    def count(self, path: str, method: str = "GET") -> int:
        """Requests for an object so far."""
        with self._lock:
            return sum(each.path == path and each.method == method for each in self.requests)

    def __enter__(self) -> LyingStore:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path).lstrip("/")
        released = self._released  # (before the answer, so that no `heal` passes unseen)
        fault = self._fault(handler, path)
        try:
            with self._counted(path):
                answer = self._ask(handler, released, heard=not isinstance(fault, Unheard))
                if fault is None:
                    answer.pass_on()
                else:
                    fault(answer)
        except ConnectionError:
            handler.close_connection = True  # whoever asked has gone

    @contextmanager
    def _counted(self, path: str) -> Iterator[None]:
        with self._lock:
            self.inside[path] += 1
        try:
            yield
        finally:
            with self._lock:
                self.inside[path] -= 1

    def _fault(self, handler: BaseHTTPRequestHandler, path: str) -> Fault | None:
        found: Fault | None = None
        with self._lock:
            if "/" in path:
                method = handler.command
                self._numbers[path] += method == "GET"
                lie = next((each for each in self._lies if each.matches(method, path)), None)
                if lie is not None:
                    found = lie.fault
                    lie.left = None if lie.left is None else lie.left - 1
                elif self._chance is not None and method == "GET":
                    found = self._chance.of(path, self._numbers[path])
            self.requests.append(Asked(handler.command, path, found, dict(handler.headers)))
        return found

    def _ask(
        self, handler: BaseHTTPRequestHandler, released: threading.Event, *, heard: bool
    ) -> Answer:
        """Ask the real endpoint, if it is to hear of this."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if not heard:
            return Answer(handler, released, 500, {}, b"")
        connection = HTTPConnection("127.0.0.1", self._upstream.port, timeout=30)
        try:
            headers = {n: v for n, v in handler.headers.items() if n.lower() != "expect"}
            connection.request(handler.command, handler.path, body, headers)
            found = connection.getresponse()
            kept = {n: v for n, v in found.getheaders() if n.lower() not in _NOT_PASSED_ON}
            of_head = (
                int(found.headers["Content-Length"] or 0) if handler.command == "HEAD" else None
            )
            return Answer(handler, released, found.status, kept, found.read(), of_head)
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    block_on_close = False  # silent ones may still wait

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of those that hang up: their processes are killed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        lingers, _ = struct.unpack("ii", request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        if lingers:
            self.close_request(request)  # a shutdown would send FIN before the RST
        else:
            super().shutdown_request(request)
