"""A web server on loopback that shows pictures, and lies when it is told to."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import cast


@dataclass(frozen=True)
class Asked:
    path: str
    headers: dict[str, str]
    """By lower-case name."""


Page = Callable[["Visit"], None]


class Visit(BaseHTTPRequestHandler):
    """One request; a page answers it by these methods."""

    protocol_version = "HTTP/1.1"

    @property
    def site(self) -> Website:
        return cast("_Server", self.server).site

    def do_GET(self) -> None:
        self.close_connection = True
        self.site.asked.append(Asked(self.path, {k.lower(): v for k, v in self.headers.items()}))
        page = self.site.pages.get(self.path.partition("?")[0])
        if page is None:
            self.answer(404)
            return
        try:
            page(self)
        except OSError:
            return  # who asked has gone

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        """:param headers: names with ``_`` for ``-``."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)

    def drip(self, data: bytes, seconds: float = 0.05) -> None:
        """Send it byte by byte, and again from its beginning, as long as somebody listens."""
        while not self.site.closing.is_set():
            for byte in data:
                self.wfile.write(bytes([byte]))
                if self.site.closing.wait(seconds):
                    return

    def silence(self) -> None:
        self.site.closing.wait(60)

    def reset(self) -> None:
        """End the connection as a crash does."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    site: Website

    def handle_error(self, *_: object) -> None:
        """Broken connections are what the tests are about."""


class Website:
    """The server; by TLS if it gets a `tls` context."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[Asked] = []
        self.pages: dict[str, Page] = {}
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), Visit)
        self._server.site = self
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def page(self, path: str, page: Page) -> str:
        """Answer `path` by `page`; returns its URL."""
        self.pages[path] = page
        return self.url(path)

    def show(self, path: str, data: bytes, etag: str | None = None, **headers: str) -> str:
        """Show `data`, and honour ``If-None-Match`` if it has an ETag; returns its URL."""
        if etag is not None:
            headers["ETag"] = etag

        def page(visit: Visit) -> None:
            if etag is not None and visit.headers["If-None-Match"] == etag:
                visit.answer(304, ETag=etag)
            else:
                visit.answer(200, data, **headers)

        return self.page(path, page)

    def redirect(self, path: str, location: str, status: int = 302) -> str:
        return self.page(path, lambda visit: visit.answer(status, Location=location))

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]

    def __enter__(self) -> Website:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
