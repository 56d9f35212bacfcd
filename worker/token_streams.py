"""The token streams of all runs of this worker: written together, by one thread.

A stream is a convenience: without Redis the job goes on. The first text of a run is written at
once, the rest each `FLUSH_SECONDS`; the texts of all runs that are due go in one round trip. So no
run's thread wakes for a token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from models.outcomes import Claim
from visq.streams import EventWriter, StreamEvent, StreamWrite

log = structlog.get_logger(__name__)

FLUSH_SECONDS: Final = 0.06
"""Between two writes of one run's tokens."""

ROUND_SECONDS: Final = 0.02
"""Between two round trips."""


class TokenStream:
    """The stream of one run; `TokenStreams` writes it."""

    def __init__(self, claim: Claim, lasts_until: float) -> None:
        self.claim = claim
        self.begun = False
        """Whether readers were told of this attempt: they discard the tokens of earlier ones."""
        self.waiting: dict[int, list[str]] = {}
        """Pieces of text that are not written yet, by choice."""
        self.due = 0.0
        self.broken = False
        """After one failure the rest would have a gap: readers take the text from the job's end."""
        self.lasts_until = lasts_until

    def take(self, now: float, ttl_seconds: float) -> list[StreamWrite]:
        """What is to be written; nothing of it waits any more."""
        job_id, attempt = self.claim.job_id, self.claim.attempt
        writes = []
        if not self.begun:
            writes.append(StreamWrite(job_id, StreamEvent(type="attempt", attempt=attempt)))
            self.begun = True
        for index, pieces in self.waiting.items():
            event = StreamEvent(type="token", attempt=attempt, text="".join(pieces), index=index)
            lasting = now > self.lasts_until
            if lasting:
                self.lasts_until = now + ttl_seconds / 2
            writes.append(StreamWrite(job_id, event, lasting=lasting))
            self.due = now + FLUSH_SECONDS
        self.waiting = {}
        return writes


class TokenStreams:
    """Thread-safe. Entries of one run are written in the order in which they came."""

    def __init__(self, events: EventWriter) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # taken before the other one
        self._pending: set[TokenStream] = set()
        self._woken = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tokens", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; what still waits is left to the end of its job."""
        self._closing.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self, claim: Claim) -> TokenStream:
        """A run begins."""
        stream = TokenStream(claim, time.monotonic() + self._events.ttl_seconds / 2)
        self._wait_for(stream)
        return stream

    def say(self, stream: TokenStream, index: int, text: str) -> None:
        """New text of choice `index`."""
        if not text or stream.broken:
            return
        with self._lock:
            stream.waiting.setdefault(index, []).append(text)
            self._pending.add(stream)
            if not self._woken.is_set():
                self._woken.set()

    def settle(self, streams: Iterable[TokenStream]) -> None:
        """Write now what waits of these runs: after it, their jobs' ends can be written."""
        self._write(list(streams))

    def forget(self, stream: TokenStream) -> None:
        """The run has ended."""
        with self._lock:
            self._pending.discard(stream)

    def _wait_for(self, stream: TokenStream) -> None:
        with self._lock:
            self._pending.add(stream)
            self._woken.set()

    def _loop(self) -> None:
        while self._woken.wait() and not self._closing.is_set():
            now = time.monotonic()
            with self._lock:
                due = [stream for stream in self._pending if stream.due <= now]
                if not self._pending:
                    self._woken.clear()
            try:
                self._write(due)
            except Exception:
                log.exception("tokens not streamed")  # the thread must outlive it
            self._closing.wait(ROUND_SECONDS)

    def _write(self, streams: Sequence[TokenStream]) -> None:
        with self._writing:
            now = time.monotonic()
            with self._lock:
                taken = [stream for stream in streams if stream in self._pending]
                self._pending.difference_update(taken)
                batches = [stream.take(now, self._events.ttl_seconds) for stream in taken]
            owners = [s for s, batch in zip(taken, batches, strict=True) for _ in batch]
            if not owners:
                return
            try:
                failures = self._events.write([write for batch in batches for write in batch])
            except Exception as error:  # noqa: BLE001  (what was taken is lost: a gap that ends them)
                self._broken(taken, error)
                return
            for stream, failure in zip(owners, failures, strict=True):
                if failure is not None:
                    self._broken([stream], failure)

    def _broken(self, streams: Sequence[TokenStream], error: Exception) -> None:
        for stream in streams:
            stream.broken = True
        log.warning(
            "tokens not streamed",
            jobs=len(streams),
            job=streams[0].claim.job_id,
            error=str(error),
        )
