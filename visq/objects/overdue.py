"""An end to how long a server may take over an answer, all of it.

The timeouts of sockets bound a silence: a server that sends one byte every ten seconds, of its
headers or of its body, holds a thread for hours. `Limit` ends that. At its time it shuts down the
connection that its thread uses, so that whatever waits there fails as if the server had gone.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_here = threading.local()


class Limit:
    """Bounds what this thread asks of servers inside the block, by clients of `bound`."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._connection: Any = None
        self.passed = False
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def pause(self, seconds: float) -> bool:
        """Sleep, if there will be time left after it; returns whether there is."""
        if self.passed or time.monotonic() + seconds >= self._end:
            return False
        time.sleep(seconds)
        return True

    def takes(self, connection: Any) -> None:
        """This thread sends a request on `connection`, which is its own until the answer is read.

        :raises TimeoutError: the time is over.
        """
        with self._lock:
            if self.passed:
                raise TimeoutError("no time is left for this request")
            self._connection = connection
            connection.limit = self

    def __enter__(self) -> Limit:
        _here.limit = self
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        _here.limit = None
        with self._lock:
            self._connection = None

    def _cut(self) -> None:
        with self._lock:
            self.passed = True
            used = self._connection
            # (Once its answer was read, it may be another thread's.)
            if used is None or used.limit is not self or used.sock is None:
                return
            with suppress(OSError):  # the server was faster
                # (Of the socket below, if this is TLS: its own `shutdown` is for its own thread.)
                socket.socket.shutdown(used.sock, socket.SHUT_RDWR)


class _Limited:
    """Of a connection: tells the limit of its thread when it is used."""

    limit: Limit | None = None

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self._tell()  # the time may have passed meanwhile

    def request(self, *args: Any, **kwargs: Any) -> Any:
        self._tell()
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def _tell(self) -> None:
        limit: Limit | None = getattr(_here, "limit", None)
        if limit is not None:
            limit.takes(self)


class _Connection(_Limited, AWSHTTPConnection):  # type: ignore[misc]
    pass


class _TLSConnection(_Limited, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(AWSHTTPSConnectionPool):
    ConnectionCls = _TLSConnection


def bound(client: S3Client) -> S3Client:
    """Let a new `client` heed `Limit`."""
    # botocore has no public way to choose connections. Its session shares this dict with the
    # managers of its pools; `tests/faults/test_store.py` fails if that changes.
    session = client._endpoint.http_session  # type: ignore[attr-defined]
    session._pool_classes_by_scheme.update({"http": _Pool, "https": _TLSPool})
    return client
