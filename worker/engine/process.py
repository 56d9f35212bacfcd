"""The engine in a process of its own: it owns CUDA and the model, and its death is survived.

If the process dies, every request in it fails with `EngineCrashed`, which is retryable, and a new
process is started. Requests that come while it loads wait for it; if it cannot load again, they
fail as well, and further starts are tried with growing pauses.

A process that hangs is killed, and then treated like one that died: one whose loop makes no round
for ``hang_seconds`` although it has requests, be it stopped, stuck in a kernel or in a deadlock.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Final, TypeAlias

from visq.errors import ConfigurationError, EngineCrashed, EngineDown, Unavailable, VisqError
from visq.pixels import PixelBuffer
from visq.types import ImagePart, ImageUrl, Message
from worker.engine import child
from worker.engine.config import EngineConfig
from worker.engine.face import (
    EngineInfo,
    EngineRequest,
    Event,
    Failed,
    Finished,
    Handle,
    KnownImage,
    Stopped,
    TokenEvent,
)
from worker.engine.lending import Lender, without_loads
from worker.engine.stats import EngineStats
from worker.engine.wire import (
    Alive,
    Cancel,
    Happened,
    LoadFailed,
    Pixels,
    PixelsNeeded,
    Ready,
    Submit,
    ToEngine,
)

logger = logging.getLogger(__name__)

DIED: Final = "the engine process died while it had this request"

DOWN: Final = "the engine is down; try again later"

LONGEST_PAUSE: Final = 30.0
"""Seconds between two starts of a process that does not come up."""

LOOK_SECONDS: Final = 0.5
"""Time between two looks at whether the process goes on."""

ENDED: Final = "the engine process ended; it is started again, and loads the model"

DIED_LOADING: Final = (
    "the engine process died while it loaded the model; if it was killed, the machine has too "
    "little memory for this model"
)


_Outbox: TypeAlias = SimpleQueue[ToEngine | None]


@dataclass(eq=False, slots=True)
class _Open:
    """A request that has no outcome yet."""

    request: EngineRequest
    handle: Handle
    submitted: float
    sent: bool = False


class ProcessEngine:
    """An `Engine` over a spawned process (`worker.engine.face` says what its methods promise)."""

    def __init__(self, config: EngineConfig) -> None:
        """Start the process and wait until the model is loaded.

        :raises ConfigurationError: if the model cannot be loaded.
        """
        config.check()
        self._config = config
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._numbers = itertools.count()
        self._lender = Lender()
        self._outbox: _Outbox | None = None  # of the process that runs, once its model is loaded
        self._process: BaseProcess | None = None
        self._gave_up = False
        self._answered = False  # whether the process that runs has answered a request
        self._closing = threading.Event()
        self._started = threading.Event()
        self._info: EngineInfo | None = None
        self._alive: Alive | None = None  # the last one of the process that runs
        self._failure: str | None = None
        # The kernel ties a child to the thread that starts it: this one lives as long as we do.
        self._keeper = threading.Thread(target=self._keep, name="visq-engine", daemon=True)
        self._keeper.start()
        # The child ignores SIGTERM, so multiprocessing's own clean-up at exit would wait for ever.
        # Ours runs before it, since that was registered first, by the import of `Connection`.
        atexit.register(self.close)
        try:
            self._started.wait()
        except BaseException:  # Ctrl-C while the model loads
            self.close()
            raise
        if self._info is None:
            self.close()
            raise ConfigurationError(self._failure or "the engine process did not start")

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None
        return self._info

    @property
    def alive(self) -> bool:
        return self._outbox is not None

    @property
    def down(self) -> str | None:
        """Why it is not alive; ``None``: it is."""
        return None if self.alive else self._failure or ENDED

    @property
    def pid(self) -> int | None:
        """Of the process that runs at present."""
        return None if self._process is None else self._process.pid

    def stats(self) -> EngineStats | None:
        """As the process that runs said at most some seconds ago: a new one counts from zero."""
        alive = self._alive
        return None if alive is None else alive.stats

    def submit(self, request: EngineRequest, sink: Callable[[Event], None] | None = None) -> Handle:
        number = next(self._numbers)
        handle = Handle(lambda: self._cancel(number), sink)
        with self._lock:
            if self._gave_up or self._closing.is_set():
                handle.publish(Failed(EngineDown(DOWN)))
                return handle
            self._open[number] = _Open(request, handle, time.monotonic())
            self._send(number)
        return handle

    def close(self) -> None:
        atexit.unregister(self.close)
        self._closing.set()
        # (`_start` looks at `_closing` once it has set `_process`.)
        if (process := self._process) is not None:
            process.kill()
        if threading.current_thread() is not self._keeper:
            self._keeper.join()
            self._lender.close()

    def _cancel(self, number: int) -> None:
        with self._lock:
            waiting = self._open.get(number)
            if waiting is not None and not waiting.sent:
                del self._open[number]
                waiting.handle.publish(Stopped("cancelled"))
            elif waiting is not None and self._outbox is not None:
                self._outbox.put(Cancel(number))

    def _send(self, number: int) -> None:
        """Send a request with what is left of its time, if the process is up (lock held)."""
        waiting = self._open[number]
        if self._outbox is None:
            return
        request, deadline = _as_sent(waiting.request), waiting.request.deadline_seconds
        if deadline is not None:
            left = deadline - (time.monotonic() - waiting.submitted)
            request = replace(request, deadline_seconds=max(left, 0.0))
        waiting.sent = True
        self._outbox.put(Submit(number, request))

    def _keep(self) -> None:
        """Start the process again and again, and hand out what it says."""
        pause = 0.0
        try:
            while not self._closing.wait(pause):
                failure = self._live()
                if self._closing.is_set():
                    break
                if failure is None:
                    # One that has answered nothing may be ill: it must not get all jobs at once.
                    pause = 0.0 if self._answered else min(LONGEST_PAUSE, 2 * pause + 1)
                    self._failure = ENDED
                    logger.error("the engine process ended; starting it again")
                    continue
                self._failure = failure
                if self._info is None:
                    break
                pause = min(LONGEST_PAUSE, 2 * pause + 1)
                logger.error("the engine did not come up again: %s", failure)
                self._give_up()
        finally:
            self._give_up()
            self._started.set()

    def _live(self) -> str | None:
        """One process from its start to its end; returns why it did not come up, if so."""
        self._answered = False
        begun = time.monotonic()
        try:
            connection = self._start()
        except OSError as error:  # no memory, no file descriptors
            return f"the engine process cannot be started: {error}"
        try:
            message = self._hear(connection)
            if isinstance(message, Ready):
                took = time.monotonic() - begun
                self._serve(connection, replace(message.info, load_seconds=took))
                return None
            if isinstance(message, LoadFailed):
                return message.message
            return DIED_LOADING
        finally:
            connection.close()
            assert self._process is not None
            self._process.kill()
            self._process.join()

    def _give_up(self) -> None:
        """Until a process is up again, requests fail at once."""
        with self._lock:
            self._gave_up = True
            self._fail_open(sent_only=False)

    def _serve(self, connection: Connection[ToEngine, Any], info: EngineInfo) -> None:
        """Hand out events until the process ends."""
        process, outbox = self._process, _Outbox()
        assert process is not None
        # In a thread of its own, so that a process that hangs holds up neither `submit` nor
        # `cancel` when the pipe is full.
        sender = threading.Thread(target=_send_all, args=(outbox, connection, process), daemon=True)
        sender.start()
        gone = threading.Event()
        watchdog = threading.Thread(target=self._watch, args=(process, gone), daemon=True)
        watchdog.start()
        with self._lock:
            self._info = info
            self._gave_up = False
            self._outbox = outbox
            for number in list(self._open):
                self._send(number)
        self._started.set()
        try:
            while isinstance(message := self._hear(connection), Happened | Alive | PixelsNeeded):
                if isinstance(message, Alive):
                    self._alive = message
                    continue
                if isinstance(message, PixelsNeeded):
                    self._lend(message, outbox)
                    continue
                self._hand_out(message)
        finally:
            gone.set()
            with self._lock:
                self._outbox = None
                self._alive = None
                self._fail_open(sent_only=True)
            process.kill()  # if it has not ended, but said something that nobody understands
            outbox.put(None)
            sender.join()
            watchdog.join()

    def _hand_out(self, happened: Happened) -> None:
        with self._lock:
            said = [(self._open.get(each[0]), TokenEvent(*each[1:])) for each in happened.said]
            ended = [(self._open.pop(number, None), outcome) for number, outcome in happened.ended]
        for request, event in said:
            if request is not None:
                request.handle.publish(event)
        self._answered = self._answered or any(isinstance(o, Finished) for _, o in ended)
        for request, outcome in ended:
            if request is not None:
                request.handle.publish(outcome)

    def _lend(self, needed: PixelsNeeded, outbox: _Outbox) -> None:
        """Load a known picture for the process behind `outbox`, not in this thread."""

        def answer(pixels: PixelBuffer | VisqError) -> None:
            outbox.put(Pixels(needed.number, needed.index, pixels))

        with self._lock:
            found = self._open.get(needed.number)
        image = None if found is None else found.request.images[needed.index]
        if isinstance(image, KnownImage):
            self._lender.lend(image, answer)
        else:
            answer(Unavailable("the request that wanted this picture has ended"))

    def _watch(self, process: BaseProcess, gone: threading.Event) -> None:
        """Kill the process if it has requests and makes no step; ends when it is `gone`."""
        # Looks are counted, not read from a clock: if it was this process that somebody stopped,
        # the engine is not to blame.
        silent, before = 0.0, 0
        while not gone.wait(LOOK_SECONDS):
            progress = 0 if self._alive is None else self._alive.progress
            with self._lock:
                has_requests = any(request.sent for request in self._open.values())
            silent = silent + LOOK_SECONDS if has_requests and progress == before else 0.0
            before = progress
            if silent >= self._config.hang_seconds:
                logger.error(
                    "the engine process made no step for %.0f s although it has requests: it is "
                    "killed",
                    silent,
                )
                process.kill()
                return

    def _fail_open(self, *, sent_only: bool) -> None:
        """Fail the requests that were in the process, or all (lock held)."""
        for number, request in list(self._open.items()):
            if request.sent or not sent_only:
                del self._open[number]
                error = EngineCrashed(DIED) if request.sent else EngineDown(DOWN)
                request.handle.publish(Failed(error))

    def _start(self) -> Connection[ToEngine, Any]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=child.main,
            args=(theirs, self._config, os.getpid()),
            name="visq-engine",
            daemon=False,  # the engine may have children of its own
        )
        # Blocked at birth: the child ignores them, but not before it runs its first line. (A first
        # start would also start multiprocessing's tracker, and that unblocks them: hence before.)
        resource_tracker.ensure_running()
        signals = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        with self._lock:
            self._process = process
        if self._closing.is_set():
            process.kill()
        return ours

    def _hear(self, connection: Connection[Any, Any]) -> object:
        """The next message; ``None`` once the process has ended."""
        try:
            return connection.recv()
        except (EOFError, OSError):
            return None


def _send_all(outbox: _Outbox, connection: Connection[ToEngine, Any], process: BaseProcess) -> None:
    """Send until ``None`` comes. If that fails, the process is of no more use: the keeper sees its
    end, and fails what it had."""
    try:
        with suppress(OSError):  # it has just died
            while (message := outbox.get()) is not None:
                connection.send(message)
    finally:
        process.kill()


def _as_sent(request: EngineRequest) -> EngineRequest:
    """`request` without the names of its images, since a ``data:`` URL holds all the bytes of one,
    and without functions."""
    if not request.images:
        return request
    unnamed = ImagePart(image_url=ImageUrl(url="-"))
    messages = [
        Message(
            role=message.role,
            content=[unnamed if isinstance(p, ImagePart) else p for p in message.parts()],
        )
        for message in request.messages
    ]
    return replace(without_loads(request), messages=messages)
