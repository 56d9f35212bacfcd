"""The native engine: continuous batching over unmodified transformers modules.

One thread owns the model. Each round of its loop::

    take in     requests that were prepared, cancels, pictures that were prepared again
    plan        which tokens of which sequences come next           (worker.engine.scheduler)
    launch      encode pictures, forward pass, sampling             (worker.engine.runner)
    finish      the tokens of the step before: text, stops, events  (worker.engine.collecting)

With `overlap`, a step is launched before the one before it is finished, so that the device never
waits for the host; a sequence that has stopped is then computed once too often, and its surplus
token is dropped. Without, each step is finished at once. The answers are the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

import torch

from visq.errors import EngineCrashed, EngineError, VisqError
from worker.engine.assembly import assemble
from worker.engine.collecting import Collector, keep_prompt_logits
from worker.engine.compiled import raise_limits
from worker.engine.config import EngineConfig
from worker.engine.face import (
    EngineInfo,
    EngineRequest,
    Event,
    Failed,
    Handle,
    Logprobs,
    Outcome,
    Stopped,
)
from worker.engine.families.base import Family, PreparedImage
from worker.engine.generation import Generation
from worker.engine.intake import Intake, Running
from worker.engine.lanes import Task
from worker.engine.loading import LoadedModel
from worker.engine.memory import give_back, is_out_of_memory, out_of_memory
from worker.engine.runner import Launched
from worker.engine.sampler import SampleRow
from worker.engine.scheduler import Step
from worker.engine.sequence import ImageSpan, Sequence
from worker.engine.stats import Counters, EngineStats

logger = logging.getLogger(__name__)

IDLE_LOOK: Final = 0.1
"""Seconds between two looks at deadlines while nothing is computed."""

HELD_PER: Final = 32
MOST_HELD: Final = 8
"""For each `HELD_PER` sequences that run together, one more token is held back before text is made
of it, up to `MOST_HELD` (some 50 ms of a busy GPU): the more run, the less time each one has."""

BUSY_LOOK: Final = 0.02
"""Seconds at least between two looks at deadlines: thousands of requests may wait."""


class NativeEngine:
    """An `Engine` in this process (`worker.engine.face` says what its methods promise)."""

    def __init__(self, loaded: LoadedModel, family: Family, config: EngineConfig) -> None:
        self._loaded = loaded
        self._family = family
        parts = assemble(loaded, family, config)
        self._sizes = parts.sizes
        self._pool = parts.pool
        self._cache = parts.cache
        self._vision = parts.vision
        self._tier = parts.tier
        self._scheduler = parts.scheduler
        self._sampler = parts.sampler
        self._adapters = parts.adapters
        self._runner = parts.runner
        on_cuda = loaded.device.type == "cuda"
        self._overlap = on_cuda if config.overlap is None else config.overlap
        self._counters = Counters()
        self._collector = Collector(self._counters, self._scheduler.add)
        self._running: dict[Task, Running] = {}
        self._owners: dict[Sequence, tuple[Running, Generation]] = {}
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._preparing: set[ImageSpan] = set()
        self._next_look = 0.0
        self.ended = threading.Event()
        """Set when the engine answers no more: closed, or CUDA has died."""
        self.progress = 0
        """Rounds of the loop so far: an engine whose number stands still hangs."""
        self._intake = Intake(
            loaded,
            family,
            self._adapters,
            self._deliver,
            max_context=self._sizes.max_context,
            prepared_bytes=config.prepared_bytes,
            is_cached=self._vision.__contains__,
            preparers=parts.preparers,
        )
        self._thread = threading.Thread(target=self._run, name="visq-engine", daemon=True)
        self._thread.start()

    # --- the face ----------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self._loaded.info(
            engine="native",
            max_context=self._sizes.max_context,
            capacity=2 * self._sizes.limits.max_sequences,
        )

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    def submit(self, request: EngineRequest, sink: Callable[[Event], None] | None = None) -> Handle:
        """Take a request.

        :param sink: takes the events in place of the handle's iterator.
        """
        seconds = request.deadline_seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        handle = Handle(lambda: self._cancel(task), sink)
        task = Task(request, handle, deadline)
        self._counters.requests += 1
        if not self._intake.waiting.put(task):
            handle.publish(Failed(EngineCrashed("the engine has ended")))
        return handle

    def close(self) -> None:
        self.ended.set()
        self._inbox.put(_nothing)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> EngineStats:
        """What the engine holds and has done so far."""
        scheduler, pool, tier = self._scheduler, self._pool, self._tier
        return EngineStats(
            queued=len(self._intake.waiting),
            waiting=len(scheduler.waiting) + len(scheduler.parked),
            running=len(scheduler.running),
            preemptions=scheduler.preemptions,
            total_blocks=pool.total,
            held_blocks=pool.held,
            available_blocks=pool.available,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            host_blocks=tier.total if tier else 0,
            host_used_blocks=tier.used if tier else 0,
            host_hits=tier.hits if tier else 0,
            vision_bytes=self._vision.nbytes,
            vision_hits=self._vision.hits,
            vision_misses=self._vision.misses,
            **self._counters.snapshot(),
        )

    def _cancel(self, task: Task) -> None:
        task.cancelled = True
        if self._intake.waiting.remove(task):
            task.handle.publish(Stopped("cancelled"))
        self._inbox.put(partial(self._stop, task))

    # --- the loop ----------------------------------------------------------------------------

    def _run(self) -> None:
        raise_limits()
        before: Launched | None = None
        try:
            while not self.ended.is_set():
                self.progress += 1
                self._take_in(wait=before is None and not self._scheduler.busy)
                self._end_expired()
                if self._tier is not None:
                    self._tier.look()
                step = self._scheduler.plan()
                self._prepare_again(step)
                self._begin(step)
                # Then everything that runs waits for pixels.
                idle = not step.chunks and before is None
                launched = self._launch(step) if step.chunks else None
                if before is not None:
                    self._finish(before)
                before = launched
                if before is not None and not self._overlap:
                    self._finish(before)
                    before = None
                if idle:
                    self._take_in(wait=bool(self._scheduler.running))
        except Exception:
            logger.exception("the engine's loop has failed; the engine ends")
        finally:
            self._end()

    def _take_in(self, *, wait: bool) -> None:
        """Do what other threads have asked for; `wait` for it if there is nothing else to do."""
        try:
            # (Waiting has an end, since deadlines of requests in preparation pass meanwhile.)
            self._inbox.get(block=wait, timeout=IDLE_LOOK if wait else None)()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            return

    def _deliver(self, task: Task, result: Running | VisqError) -> None:
        """From the intake's threads."""
        self._inbox.put(partial(self._enter, task, result))

    def _enter(self, task: Task, result: Running | VisqError) -> None:
        if isinstance(result, VisqError):
            task.handle.publish(Failed(result))
            return
        self._running[task] = result
        if (adapter := result.first.adapter) is not None:
            self._adapters.install(adapter)
        for generation in result.generations:
            self._owners[generation.sequence] = (result, generation)
        self._scheduler.add(result.first)
        if task.cancelled:  # while it was prepared
            self._stop(task)
        elif task.expired:
            self._end_request(result, Stopped("expired"))

    def _stop(self, task: Task) -> None:
        """It was cancelled."""
        if (running := self._running.get(task)) is not None:
            self._end_request(running, Stopped("cancelled"))

    def _end_expired(self) -> None:
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + BUSY_LOOK
        for task in self._intake.waiting.take_expired():
            task.handle.publish(Stopped("expired"))
        for task, running in list(self._running.items()):
            if task.expired:
                self._end_request(running, Stopped("expired"))

    def _prepare_again(self, step: Step) -> None:
        """Ask for the pictures that must be encoded and whose pixels are not there."""
        for sequence, image in step.unprepared:
            if image in self._preparing:
                continue
            self._preparing.add(image)
            running, _ = self._owners[sequence]
            self._intake.prepare_again(
                running.task.request.images[image.index],
                partial(self._deliver_image, sequence, image),
                partial(self._running.__contains__, running.task),
            )

    def _deliver_image(
        self, sequence: Sequence, image: ImageSpan, result: PreparedImage | VisqError
    ) -> None:
        """From the intake's threads."""
        self._inbox.put(partial(self._prepared, sequence, image, result))

    def _prepared(
        self, sequence: Sequence, image: ImageSpan, result: PreparedImage | VisqError
    ) -> None:
        self._preparing.discard(image)
        if sequence.ended:
            return
        if isinstance(result, VisqError):
            self._end_request(self._owners[sequence][0], Failed(result))
        else:
            image.prepared = result
            self._scheduler.unpark(sequence)

    def _begin(self, step: Step) -> None:
        """Give their slots to those that were admitted, though their chunk may come later."""
        for sequence in step.admitted:
            if sequence.slot >= 0:
                running, generation = self._owners[sequence]
                with self._failing(running):
                    if not self._has_begun(sequence, generation):
                        self._make_room()
                        self._begin_one(sequence, generation)

    def _has_begun(self, sequence: Sequence, generation: Generation) -> bool:
        """Begin it; False if there was no memory for that."""
        try:
            self._begin_one(sequence, generation)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _begin_one(self, sequence: Sequence, generation: Generation) -> None:
        generated = generation.generated_ids
        self._sampler.begin(sequence.slot, generation.params, generated)
        if generated:
            self._runner.resume(sequence.slot, generated[-1])

    def _launch(self, step: Step) -> Launched | None:
        try:
            launched = self._compute(step)
        except Exception as error:
            if is_out_of_memory(error):
                logger.exception(
                    "no memory for a step of %d tokens; the next ones are smaller", step.tokens
                )
            elif isinstance(error, torch.AcceleratorError):
                # CUDA is unusable from here on: only a new process helps.
                self.ended.set()
                raise
            else:
                logger.exception("a step of %d sequences has failed", len(step.chunks))
                if not self._scheduler.suspect(step):
                    self._fail(step, error if isinstance(error, VisqError) else _failure(error))
                return None
        else:
            if launched is not None:
                self._scheduler.launched(step)
            return launched
        self._make_room()
        if not self._scheduler.shrink(step):
            self._fail(step, out_of_memory())
        return None

    def _compute(self, step: Step) -> Launched | None:
        """Let the device begin `step`; ``None`` if nothing is left of it."""
        rows = self._rows(step)
        if not step.chunks:
            return None
        start = time.monotonic()
        self._runner.encode(step)
        if step.encode:
            self._counters.encoded_images += len(step.encode)
            self._counters.vision_seconds += time.monotonic() - start
        keep = rows is not None and any(
            self._owners[c.sequence][1].keep_logits for c in step.chunks if c.samples
        )
        return self._runner.launch(step, rows, keep_logits=keep)

    def _make_room(self) -> None:
        """There was no memory: do without what can be computed again."""
        self._vision.clear()
        give_back()

    def _fail(self, step: Step, error: VisqError) -> None:
        for chunk in step.chunks:
            if chunk.sequence in self._owners:
                self._end_request(self._owners[chunk.sequence][0], Failed(error))

    def _rows(self, step: Step) -> list[SampleRow] | None:
        """How the step's tokens are sampled (``None``: all of them are plain); a request that
        cannot say so leaves the step."""
        if any(chunk.sequence.ended for chunk in step.chunks):
            step.keep(lambda chunk: not chunk.sequence.ended)  # it failed when it got its slot
        if all(self._owners[chunk.sequence][1].plain for chunk in step.chunks):
            return None
        rows: dict[Sequence, SampleRow] = {}
        for chunk in step.chunks:
            if chunk.sequence.ended:
                continue  # with another choice of its request
            running, generation = self._owners[chunk.sequence]
            with self._failing(running):
                if chunk.samples:
                    rows[chunk.sequence] = generation.row()
        step.keep(lambda chunk: not chunk.sequence.ended)
        return [rows[chunk.sequence] for chunk in step.chunks if chunk.samples]

    def _finish(self, launched: Launched) -> None:
        """Wait for a launched step and hand out its tokens."""
        if launched.ran is not None:
            launched.ran.synchronize()  # also of a step without tokens, or the host runs away
        tokens: list[int] = launched.tokens.wait().tolist() if launched.tokens else []
        logprobs: dict[int, Logprobs] = {}
        failed: Mapping[int, Exception] = {}
        if (sampled := launched.sampled) is not None:
            failed = sampled.failed
            if launched.logprobs is not None:
                logprobs = sampled.unpack_logprobs(launched.logprobs.wait())
        of_logits = launched.logits.wait() if launched.logits else None
        self._counters.steps += 1
        self._counters.step_tokens += launched.step.tokens
        for sequence, start, of_prompt in launched.prompt_logits:
            if sequence not in self._owners:
                continue
            running, _ = self._owners[sequence]
            with self._failing(running):
                keep_prompt_logits(running, sequence, start, of_prompt)
        hold = min(1 + len(launched.sampling) // HELD_PER, MOST_HELD)
        for row, sequence in enumerate(launched.sampling):
            if sequence.ended:
                continue  # it has stopped: this token is one too many
            running, generation = self._owners[sequence]
            logits = None
            if generation.keep_logits and of_logits is not None:
                # (A mere view would keep the rows of the whole batch.)
                logits = of_logits[row].numpy().copy()
            try:
                if row in failed:
                    raise failed[row]
                self._collector.take(
                    running, generation, tokens[row], logprobs.get(row), logits, hold=hold
                )
            except Exception as error:  # noqa: BLE001  (it is this request's own)
                self._blame(running, error)
        self._scheduler.finished(launched.step)
        for sequence in launched.sampling:
            if sequence.ended and sequence in self._owners:
                running, _ = self._owners[sequence]
                if self._tier is not None and running.task.request.goes_on:
                    hashes = sequence.hashes[: sequence.registered]
                    self._tier.keep(hashes, sequence.blocks[: len(hashes)])
                if self._scheduler.knows(sequence):
                    self._scheduler.remove(sequence)
                if all(generation.choice is not None for generation in running.generations):
                    self._end_request(running, self._collector.finish(running))

    @contextmanager
    def _failing(self, running: Running) -> Iterator[None]:
        """What is raised inside ends this request, and no other."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  (it is this request's own)
            self._blame(running, error)

    def _blame(self, running: Running, error: Exception) -> None:
        """End a request in whose own part `error` was raised."""
        if not isinstance(error, VisqError):
            logger.error("request %s failed", running.task.request.id, exc_info=error)
            error = _failure(error)
        self._end_request(running, Failed(error))

    def _end_request(self, running: Running, outcome: Outcome) -> None:
        """Publish the outcome and give everything back."""
        if self._running.pop(running.task, None) is None:
            return  # it has ended already
        if isinstance(outcome, Stopped):
            for generation in running.generations:
                if generation.choice is None and (event := generation.answer.held()) is not None:
                    running.task.handle.publish(event)
        for generation in running.generations:
            sequence = generation.sequence
            sequence.ended = True
            del self._owners[sequence]
            if self._scheduler.knows(sequence):
                self._scheduler.remove(sequence)
        if (adapter := running.first.adapter) is not None:
            self._adapters.release(adapter)
        running.task.handle.publish(outcome)

    def _end(self) -> None:
        self.ended.set()
        error = EngineCrashed("the engine has ended")
        for task in self._intake.close():
            task.handle.publish(Failed(error))
        self._take_in(wait=False)
        for running in list(self._running.values()):
            self._end_request(running, Failed(error))


def _failure(error: Exception) -> EngineError:
    if is_out_of_memory(error):
        return out_of_memory()
    return EngineError("the engine failed on this request; its log says more")


def _nothing() -> None:
    """Wakes the loop up."""
