"""Processes beside the engine that prepare pictures, so that its steps need not share Python.

::

    engine process                                   preparing process (`worker.engine.preparer`)
    prepare(PixelBuffer), any thread
      -> a thread for each process  -- names -->       pixels, from shared memory
      <- PreparedImage, views       <-- memory --      uint8 tensors (`worker.engine.sharing`)

A process that dies or hangs takes down the picture that it had, and no other; a new one takes its
place. While none is there (they load for some seconds, or cannot be started), `prepare` leaves the
picture to the caller.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.reduction import recv_handle
from typing import TYPE_CHECKING, Any, Final

from visq.errors import EngineCrashed, VisqError
from visq.pixels import PixelBuffer
from worker.engine import preparer
from worker.engine.families.base import PreparedImage
from worker.engine.sharing import mapped

if TYPE_CHECKING:
    from worker.engine.config import EngineConfig
    from worker.engine.families.base import Family
    from worker.engine.loading import LoadedModel

logger = logging.getLogger(__name__)

_SPAWN: Final = multiprocessing.get_context("spawn")

START_SECONDS: Final = 120.0
"""A process imports transformers and reads the processor's files."""

PICTURE_SECONDS: Final = 60.0
"""The longest that preparing one picture may take; it takes some milliseconds."""

STARTS: Final = 3
"""Failed starts in a row after which a process is not started again."""

MOST: Final = 6
"""Processes at most, unless a setting asks for more: so many prepare 1000 pictures a second."""


@dataclass(frozen=True, slots=True)
class _Job:
    picture: PixelBuffer
    made: Future[PreparedImage | None] = field(default_factory=Future)


class Preparers:
    """Some preparing processes. Thread-safe."""

    def __init__(self, count: int, start: Callable[[], _Process]) -> None:
        """:param start: starts one process."""
        self.count = count
        self._start = start
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._processes: set[_Process] = set()
        self._ready = 0
        self._closing = False
        # The kernel ties a child to the thread that starts it: these live as long as we do.
        self._threads = [
            threading.Thread(target=self._keep, name=f"visq-preparer-{index}", daemon=True)
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def beside(cls, config: EngineConfig, loaded: LoadedModel, family: Family) -> Preparers | None:
        """Those of an engine that is configured so; ``None``: it prepares pictures itself."""
        count = config.preparers
        if count is None:
            count = default_count() if loaded.device.type == "cuda" else 0
        if not count or family.image_token_id is None:
            return None
        return cls(count, lambda: _Process(config.source, family.normalisation, config.log_level))

    @property
    def ready(self) -> int:
        """Processes that take pictures."""
        return self._ready

    @property
    def busy(self) -> int:
        """Processes that have a picture."""
        with self._lock:
            return sum(process.busy for process in self._processes)

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        with self._lock:
            return [each.pid for each in self._processes]

    def prepare(self, picture: PixelBuffer) -> PreparedImage | None:
        """Have it prepared; ``None``: there is no process to do it.

        :raises EngineCrashed: the process died of it or beside it: retryable.
        :raises VisqError: what `Family.prepare_image` raises.
        """
        job = _Job(picture)
        with self._lock:
            if not self._ready:
                return None
            self._jobs.put(job)
        return job.made.result()

    def close(self) -> None:
        """End the processes; pictures that they have are failed. Idempotent."""
        with self._lock:
            self._closing = True
            for process in self._processes:
                process.kill()
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _keep(self) -> None:
        """Start a process, and start it again when it has ended."""
        failures = 0
        while failures < STARTS:
            try:
                process = self._start()
            except Exception:  # no memory, no descriptors, or no children allowed
                logger.exception("a preparing process cannot be started")
                failures += 1
                continue
            with self._lock:
                self._processes.add(process)
                if self._closing:
                    process.kill()
            try:
                if process.wait_until_ready():
                    failures = 0
                    self._serve(process)
                elif not self._closing:
                    failures += 1
                    logger.error("a preparing process did not come up")
            finally:
                with self._lock:
                    self._processes.discard(process)
                process.end()
            if self._closing:
                return
        logger.error(
            "a preparing process is not tried again; the engine prepares pictures itself if there "
            "is no other"
        )

    def _serve(self, process: _Process) -> None:
        """Give the process pictures until it ends or we close."""
        with self._lock:
            self._ready += 1
        try:
            while not self._closing and self._serve_next(process):
                pass
        finally:
            with self._lock:
                self._ready -= 1
                if not self._ready:
                    self._leave_to_callers()

    def _serve_next(self, process: _Process) -> bool:
        """Give it one picture, of which nothing is kept here; returns whether it may have more."""
        if (job := self._jobs.get()) is None:
            return False
        if not process.alive:  # it died between two pictures
            job.made.set_result(None)
            return False
        try:
            job.made.set_result(process.prepare(job.picture))
        except EngineCrashed as error:
            if not self._closing:
                logger.warning("preparing process %d has died or hangs", process.pid)
            job.made.set_exception(error)
            return False
        except VisqError as error:
            job.made.set_exception(error)
        except BaseException as error:  # no descriptors, no memory to map: somebody waits for this
            logger.exception("a prepared picture cannot be taken over")
            job.made.set_exception(EngineCrashed(f"a picture could not be prepared: {error}"))
            return False
        return True

    def _leave_to_callers(self) -> None:
        """What waits would wait for the start of a process (lock held)."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.made.set_result(None)


def default_count() -> int:
    """A third of the cores: decoding, the engine and the worker want some as well."""
    return max(1, min(MOST, len(os.sched_getaffinity(0)) // 3))


class _Process:
    """One preparing process, used by one thread at a time."""

    def __init__(self, source: str, normalisation: Any, log_level: str) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(
            target=preparer.serve,
            args=(theirs, source, normalisation, log_level, os.getpid()),
            name="visq-prepare",
            daemon=True,
        )
        self._process.start()
        self.busy = False
        theirs.close()  # else the pipe would not end with the process

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def wait_until_ready(self) -> bool:
        try:
            return self._pipe.poll(START_SECONDS) and bool(self._pipe.recv())
        except (EOFError, OSError):
            return False

    def prepare(self, picture: PixelBuffer) -> PreparedImage:
        """
        :raises EngineCrashed: if it is of no more use.
        :raises VisqError: what is wrong with the picture.
        """
        self.busy = True
        try:
            self._pipe.send(picture)
            if not self._pipe.poll(PICTURE_SECONDS):
                raise EngineCrashed(f"preparing a picture took longer than {PICTURE_SECONDS:g} s")
            answer = self._pipe.recv()
            if isinstance(answer, VisqError):
                raise answer
            fd = recv_handle(self._pipe)
        except (EOFError, OSError) as error:
            raise EngineCrashed("the process that prepared a picture died") from error
        finally:
            self.busy = False
        try:
            return PreparedImage(answer.token_ids, mapped(fd, answer.places))
        finally:
            os.close(fd)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
