"""A worker process with an engine that only plays: ``python -m bench.played_worker``.

All of it is real (Celery, SQL, Redis, pictures, the pipe to the engine's process) but the model:
requests join a running batch, each step says one token of each, and an answer is as long as
``max_new_tokens``. So it shows what the worker itself costs at the pace of a GPU.
"""

from __future__ import annotations

import os
import threading
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, Final

from visq.settings import Settings
from worker import main as worker_main
from worker.engine import child, opening, process
from worker.engine.config import EngineConfig
from worker.engine.face import Choice, EngineInfo, EngineRequest, Finished, Handle, TokenEvent

STEP_SECONDS: Final = float(os.environ.get("VISQ_BENCH_STEP", "0.0125"))
SEQUENCES: Final = int(os.environ.get("VISQ_BENCH_SEQUENCES", "256"))


class PlayedEngine:
    """A running batch without a model."""

    def __init__(self, config: EngineConfig) -> None:
        self.info = EngineInfo(
            "played", "native", "none", "none", 0.0, max_context=4096, capacity=SEQUENCES
        )
        self.ended = threading.Event()
        self.progress = 0
        """Steps: the worker looks whether there are any."""
        self._waiting: list[tuple[Handle, int]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._steps, daemon=True).start()

    def submit(self, request: EngineRequest, sink: Any = None) -> Handle:
        handle = Handle(lambda: None, sink)
        with self._lock:
            self._waiting.append((handle, request.gen_config.max_new_tokens or 1))
        return handle

    def stats(self) -> None:
        """It has none."""

    def _steps(self) -> None:
        running: list[tuple[Handle, list[int], int]] = []
        following = time.monotonic()
        while True:
            self.progress += 1
            with self._lock:
                room = max(0, SEQUENCES - len(running))
                joining, self._waiting = self._waiting[:room], self._waiting[room:]
            running += [(handle, [], most) for handle, most in joining]
            going_on = []
            for handle, ids, most in running:
                ids.append(len(ids))
                handle.publish(TokenEvent(" word", [len(ids)]))
                if len(ids) < most:
                    going_on.append((handle, ids, most))
                else:
                    handle.publish(Finished((Choice(" word" * most, "length", ids),), 309))
            running = going_on
            following = max(following + STEP_SECONDS, time.monotonic())
            time.sleep(max(0.0, following - time.monotonic()))


def play(connection: Connection[Any, Any], config: EngineConfig, owner: int) -> None:
    """The engine's process."""
    opening.open_engine = PlayedEngine  # type: ignore[assignment]
    child.main(connection, config, owner)


def main() -> None:
    process.child = SimpleNamespace(main=play)  # type: ignore[assignment]
    raise SystemExit(worker_main.run(Settings()))


if __name__ == "__main__":
    main()
