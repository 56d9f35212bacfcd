"""An engine without a model, for the tests of faults: what it answers can be computed anew.

An answer is a digest of all that the engine was shown, the history and the pictures included, and
the process id of the worker that ran it. So a turn that was left out, doubled or put in another
place, a picture that was cut off, and an answer that a run wrote after it had lost its job, all
show in a text. Requests join a running batch, as in the real engine, and take a step for each of
``max_new_tokens``. It runs in the real engine's process, behind the real pipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from visq.types import Message, TextPart
from worker.engine.config import EngineConfig
from worker.engine.face import (
    Choice,
    EngineInfo,
    EngineRequest,
    Event,
    Finished,
    Handle,
    Stopped,
    TokenEvent,
)

STEP_SECONDS: Final = 0.02
CAPACITY: Final = 32

KILLS_ENGINE: Final = "a poison for engines"
"""A prompt with these words ends the engine's process each time, two steps after it came."""
KILLS_WORKER: Final = "a poison for workers"
"""So does one with these, and takes the worker along."""


def answer_to(messages: Sequence[Message], pictures: Sequence[str], author: int) -> str:
    """What this engine says.

    :param pictures: SHA-256 of each picture's file, in the order of the image parts.
    :param author: process id of the worker.
    """
    shown = [
        [m.role, [part.text if isinstance(part, TextPart) else "<image>" for part in m.parts()]]
        for m in messages
    ]
    digest = hashlib.sha256(json.dumps([shown, list(pictures)]).encode()).hexdigest()
    return f"{digest[:24]} by {author}"


@dataclass(eq=False)
class _Running:
    request: EngineRequest
    handle: Handle
    text: str
    since: float
    steps: int = 0
    cancelled: bool = False

    @property
    def expired(self) -> bool:
        deadline = self.request.deadline_seconds
        return deadline is not None and time.monotonic() - self.since > deadline


class PlayedEngine:
    """An `Engine` of one thread that steps all its requests together."""

    def __init__(self, config: EngineConfig) -> None:
        self.info = EngineInfo(
            "played", "native", "none", "none", 0.0, max_context=4096, capacity=CAPACITY
        )
        self.ended = threading.Event()
        self.progress = 0
        self._joining: list[_Running] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._loop, daemon=True).start()

    def stats(self) -> None:
        return None

    def submit(self, request: EngineRequest, sink: Callable[[Event], None] | None = None) -> Handle:
        pictures = [image.sha256 for image in request.images]
        text = answer_to(request.messages, pictures, os.getppid())
        running: _Running

        def cancel() -> None:
            running.cancelled = True

        running = _Running(request, Handle(cancel, sink), text, time.monotonic())
        with self._lock:
            self._joining.append(running)
        return running.handle

    def _loop(self) -> None:
        running: list[_Running] = []
        while True:
            with self._lock:
                running += self._joining
                self._joining = []
            running = [each for each in running if self._step(each)]
            self.progress += 1
            time.sleep(STEP_SECONDS)

    def _step(self, running: _Running) -> bool:
        """One token of one request; whether it goes on."""
        if running.cancelled or running.expired:
            running.handle.publish(Stopped("cancelled" if running.cancelled else "expired"))
            return False
        most = running.request.gen_config.max_new_tokens or 1
        length = len(running.text)
        begin, end = length * running.steps // most, length * (running.steps + 1) // most
        running.handle.publish(TokenEvent(running.text[begin:end], [running.steps]))
        running.steps += 1
        if running.steps == 2:
            _take_poison(running.request.messages[-1])
        if running.steps < most:
            return True
        choice = Choice(running.text, "stop", list(range(most)))
        running.handle.publish(Finished((choice,), prompt_tokens=len(running.request.messages)))
        return False


def _take_poison(message: Message) -> None:
    said = str(message.content)
    if KILLS_WORKER in said:
        os.kill(os.getppid(), signal.SIGKILL)
    if KILLS_ENGINE in said:
        os.kill(os.getpid(), signal.SIGKILL)
