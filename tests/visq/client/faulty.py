"""A real HTTP server that fails on demand; what it does not fail, it passes on to the real API."""

from __future__ import annotations

import http.server
import socket
import threading
from dataclasses import dataclass, field
from types import TracebackType

import httpx2


@dataclass(frozen=True)
class Close:
    """Close the connection without an answer; the API does not get the request."""


@dataclass(frozen=True)
class LoseAnswer:
    """Pass the request on, and close the connection instead of answering."""


@dataclass(frozen=True)
class Cut:
    """Pass the answer on until it holds `after`, then close the connection."""

    after: bytes


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


Fault = Close | LoseAnswer | Cut | Reply


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class FaultyServer:
    """``with FaultyServer(api.url) as server``: one fault a request, while there are some."""

    def __init__(self, target: str = "") -> None:
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self._target = httpx2.Client(base_url=target, timeout=60)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._target.close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.seen.append(Seen(self.command, self.path, headers, body))
                server.act(self, server.seen[-1], server.faults.pop(0) if server.faults else None)

            do_GET = do_POST = do_DELETE = handle_any  # noqa: N815  # names of http.server

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        return Handler

    def act(
        self, handler: http.server.BaseHTTPRequestHandler, request: Seen, fault: Fault | None
    ) -> None:
        match fault:
            case Close():
                handler.connection.shutdown(socket.SHUT_RDWR)
            case Reply(status, headers, body):
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.end_headers()
                handler.wfile.write(body)
            case LoseAnswer():
                with self._passed_on(request) as answer:
                    answer.read()
                handler.connection.shutdown(socket.SHUT_RDWR)
            case Cut() | None:
                self._relay(handler, request, fault.after if fault else None)

    def _relay(
        self, handler: http.server.BaseHTTPRequestHandler, request: Seen, cut_after: bytes | None
    ) -> None:
        with self._passed_on(request) as answer:
            handler.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name not in ("content-length", "transfer-encoding", "connection"):
                    handler.send_header(name, value)
            handler.end_headers()  # HTTP/1.0: the end of the connection is the end of the body
            sent = b""
            for chunk in answer.iter_raw():
                handler.wfile.write(chunk)
                sent += chunk
                if cut_after is not None and cut_after in sent:
                    return

    def _passed_on(self, request: Seen):  # noqa: ANN202  # a context manager of httpx2
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "connection")}
        return self._target.stream(
            request.method, request.path, headers=headers, content=request.body
        )
