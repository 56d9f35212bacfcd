"""The consumer of `visq demo`: a program of its own that reads results from a queue.

``python -m visq.cli.demo_consumer QUEUE TOPIC`` with ``VISQ_BROKER_URL`` prints one line of JSON
for each result. `ConsumerProcess` is the demo's end of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final

from visq.errors import Unavailable

READY: Final = "ready"
START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0


class ConsumerProcess:
    """Runs the consumer; `show` is called with each line, in a thread.

    It is ended with the context, and its queue deleted.
    """

    def __init__(
        self, broker_url: str, queue: str, topic: str, show: Callable[[str], None]
    ) -> None:
        self._broker_url = broker_url
        self._queue = queue
        self._show = show
        self._command = [sys.executable, "-m", "visq.cli.demo_consumer", queue, topic]
        self._count = 0
        self._changed = threading.Condition()
        self._ready = threading.Event()
        """It is ready, or has ended."""
        self._is_ready = False

    def wait_for(self, count: int, seconds: float) -> int:
        """Wait until so many results have come; how many are missing."""
        with self._changed:
            self._changed.wait_for(lambda: self._count >= count, seconds)
            return max(0, count - self._count)

    def __enter__(self) -> ConsumerProcess:
        """:raises Unavailable: it does not reach the broker."""
        from visq.embedded.processes import start_tethered

        self._process = start_tethered(
            self._command,
            env={**os.environ, "VISQ_BROKER_URL": self._broker_url},
            stdout=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(START_SECONDS)
        if not self._is_ready:
            self.__exit__(None, None, None)
            raise Unavailable("the consumer did not reach the broker")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from visq.embedded.processes import end

        end(self._process, STOP_SECONDS)
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode().strip()
            if text == READY:
                self._is_ready = True
                self._ready.set()
                continue
            self._show(text)
            with self._changed:
                self._count += 1
                self._changed.notify_all()
        self._ready.set()  # or it never will be


def main() -> None:
    """Consume until SIGTERM, then delete the queue."""
    from kombu import Connection, Queue

    from visq import consume
    from visq.client.servers import find_broker
    from visq.consumer import Event

    queue, topic = sys.argv[1:]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def show(event: Event) -> None:
        text = event.job.result.text if event.job.result is not None else ""
        say(json.dumps({"id": event.id, "type": event.type, "text": text}))

    consume(
        queue,
        show,
        topics=topic,
        stop=stop,
        on_ready=lambda: say(READY),
        max_deliveries=None,  # no further queues, which would be left behind
    )
    with Connection(find_broker(None)) as connection:
        Queue(queue)(connection.default_channel).delete()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
