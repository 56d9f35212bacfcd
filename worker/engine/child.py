"""The engine process: an engine at the end of a pipe.

It ends with its owner, however that ends: the kernel kills it when the thread that started it is
gone, and it leaves by itself when the pipe closes. Ctrl-C and SIGTERM, which a terminal or a
container sends to all processes at once, are the owner's to handle.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import sys
import threading
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final, NoReturn

from visq import logs
from visq.errors import ConfigurationError
from worker.engine.config import EngineConfig
from worker.engine.face import Event, Handle, TokenEvent
from worker.engine.lending import Borrower
from worker.engine.postbox import Postbox
from worker.engine.wire import (
    ALIVE_SECONDS,
    Alive,
    Cancel,
    LoadFailed,
    Pixels,
    Ready,
    Submit,
    ToEngine,
)

if TYPE_CHECKING:
    from worker.engine.opening import LocalEngine

PR_SET_PDEATHSIG: Final = 1


def main(connection: Connection[Any, ToEngine], config: EngineConfig, owner: int) -> None:
    """Load the model, say so, and answer until the owner goes.

    :param owner: process id of the process that started this one.
    """
    die_with(owner)
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    # They were blocked at birth, so that none came before this line (see `ProcessEngine`).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    faulthandler.enable()
    logs.configure(config.log_level)
    _Server(connection).serve(config)


class _Server:
    def __init__(self, connection: Connection[Any, ToEngine]) -> None:
        self._connection = connection
        self._outbox = Postbox()
        self._handles: dict[int, Handle] = {}
        self._borrower = Borrower(self._outbox.put)
        self._report_waits = False
        self._relayed = 0

    def serve(self, config: EngineConfig) -> NoReturn:
        from worker.engine.opening import open_engine

        try:
            engine = open_engine(config)
        except ConfigurationError as error:
            self._send(LoadFailed(error.message))
            os._exit(1)
        # What was loaded stays: looking at it again in every collection costs a step of the model
        # some milliseconds.
        gc.collect()
        gc.freeze()
        threading.Thread(target=_leave_after, args=(engine.ended,), daemon=True).start()
        self._send(Ready(engine.info))
        threading.Thread(target=self._send_outbox, daemon=True).start()
        threading.Thread(target=self._report, args=(engine,), daemon=True).start()
        while True:
            match self._receive():
                case Submit(number, request):
                    request = self._borrower.attach(number, request)
                    handle = engine.submit(request, partial(self._relay, number))
                    self._handles[number] = handle
                    if handle.ended:  # perhaps before the line above
                        self._handles.pop(number, None)
                case Cancel(number):
                    if (running := self._handles.get(number)) is not None:
                        running.cancel()
                case Pixels() as answer:
                    self._borrower.answered(answer)

    def _receive(self) -> ToEngine:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # the owner is gone

    def _relay(self, number: int, event: Event) -> None:
        self._relayed += 1
        self._outbox.happened(number, event)
        if not isinstance(event, TokenEvent):
            self._handles.pop(number, None)
            self._borrower.ended(number)

    def _report(self, engine: LocalEngine) -> None:
        while not engine.ended.wait(ALIVE_SECONDS):
            if self._report_waits:
                continue  # behind a full pipe they would pile up
            self._report_waits = True
            progress = engine.progress
            if progress is None:  # it counts nothing; its requests are all in one thread
                self._relayed += self._borrower.waits  # then it is not the engine that is slow
                progress = self._relayed
            self._outbox.put(Alive(progress, engine.stats()))

    def _send_outbox(self) -> None:
        """In a thread of its own, so that a full pipe stops neither the model nor `_receive`: with
        both ends waiting to send, nobody would read."""
        while True:
            for message in self._outbox.take():
                self._send(message)
                if isinstance(message, Alive):
                    self._report_waits = False

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            os._exit(0)  # the owner is gone


def _leave_after(ended: threading.Event) -> None:
    """End the process once the engine has: a new one takes its place."""
    ended.wait()
    os._exit(1)


def die_with(owner: int) -> None:
    """End with the process `owner`, and with the thread of it that started this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it died before this line
        os._exit(1)
