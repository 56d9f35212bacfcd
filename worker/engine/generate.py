"""The plain engine: transformers' ``model.generate``, one request after the other.

It runs every model that transformers can load, and nothing fast: no batching, no cache between
requests. One thread owns the model and takes the waiting requests by lane. Between two tokens it
looks for cancellation and deadlines.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from visq.errors import (
    EngineCrashed,
    EngineError,
    VisqError,
)
from worker.engine.answer import Answer
from worker.engine.answering import Answering
from worker.engine.face import (
    EngineInfo,
    EngineRequest,
    Event,
    Failed,
    Finished,
    Handle,
    KnownImage,
    Outcome,
    Stopped,
)
from worker.engine.lanes import LaneQueue, Task
from worker.engine.loading import LoadedModel
from worker.engine.memory import give_back, is_out_of_memory, out_of_memory
from worker.engine.prompt import PromptBuilder
from worker.engine.sampling import check, hf_generation_config, logits_processors

logger = logging.getLogger(__name__)


class GenerateEngine:
    """An `Engine` in this process (`worker.engine.face` says what its methods promise)."""

    progress = None
    """It counts no steps."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._generator = _Generator(self._loaded)
        self._waiting = LaneQueue()
        self.ended = threading.Event()
        """Set when the engine answers no more: closed, or CUDA has died."""
        self._thread = threading.Thread(target=self._run, name="visq-engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._loaded.info(
            engine="generate",
            max_context=self._loaded.max_context,
            capacity=2,  # so that the next one's pictures are fetched meanwhile
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
        try:
            check(request, self._loaded.vocab_size)
        except VisqError as error:
            handle.publish(Failed(error))
            return handle
        if not self._waiting.put(task):
            handle.publish(Failed(EngineCrashed("the engine has ended")))
        return handle

    def stats(self) -> None:
        """This engine counts nothing."""

    def close(self) -> None:
        self.ended.set()
        self._fail_waiting()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _cancel(self, task: Task) -> None:
        task.cancelled = True
        if self._waiting.remove(task):
            task.handle.publish(Stopped("cancelled"))

    def _fail_waiting(self) -> None:
        for task in self._waiting.close():
            task.handle.publish(Failed(EngineCrashed("the engine has ended")))

    def _run(self) -> None:
        try:
            while (task := self._waiting.take()) is not None:
                task.handle.publish(self._outcome(task))
        finally:
            self.ended.set()
            self._fail_waiting()

    def _outcome(self, task: Task) -> Outcome:
        """Answer one request; whatever goes wrong is its own failure, and only its own."""
        try:
            return self._generator.answer(task, self._between_tokens)
        except VisqError as error:
            return Failed(error)
        except Exception as error:
            if is_out_of_memory(error):
                logger.exception("request %s: out of memory", task.request.id)
            elif isinstance(error, torch.AcceleratorError):
                # CUDA is unusable from here on: only a new process helps.
                logger.exception("request %s: CUDA failed; the engine ends", task.request.id)
                self.ended.set()
                self._fail_waiting()
                return Failed(EngineCrashed("CUDA failed while this request was in the engine"))
            else:
                logger.exception("request %s failed", task.request.id)
                return Failed(EngineError("the engine failed on this request; its log says more"))
        give_back()
        return Failed(out_of_memory())

    def _between_tokens(self, task: Task) -> Outcome | None:
        """What ends the running `task` now, if anything; also ends waiting tasks in time."""
        for late in self._waiting.take_expired():
            late.handle.publish(Stopped("expired"))
        if self.ended.is_set():
            return Failed(EngineCrashed("the engine has ended"))
        if task.cancelled:
            return Stopped("cancelled")
        return Stopped("expired") if task.expired else None


class _Generator:
    """Runs ``model.generate`` for one task at a time."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._prompts = PromptBuilder(
            loaded.name, loaded.processor, takes_images=loaded.takes_images
        )
        self._answering = Answering(loaded, loaded.max_context)

    def answer(self, task: Task, between_tokens: Callable[[Task], Outcome | None]) -> Outcome:
        """Answer `task`, publishing its token events.

        :param between_tokens: asked before each token whether the task must end.
        """
        if (end := between_tokens(task)) is not None:
            return end
        request = task.request
        config = request.gen_config
        images = [i.load() if isinstance(i, KnownImage) else i for i in request.images]
        tensors = self._prompts.build(request.messages, images, do_preprocess=request.do_preprocess)
        prompt_tokens = tensors["input_ids"].shape[1]
        max_new_tokens = self._answering.room(prompt_tokens, config.max_new_tokens)
        answer = self._answering.answer(config)
        watch = _Watch(task, answer, between_tokens)
        with self._seeded(config.random_seed):
            self._loaded.model.generate(
                **self._on_device(tensors),
                generation_config=hf_generation_config(config, max_new_tokens),
                logits_processor=logits_processors(
                    config,
                    prompt_tokens=prompt_tokens,
                    end_ids=self._loaded.end_ids,
                    stop_ids=self._answering.stop_ids(config),
                    bad_words=self._answering.bad_words(config),
                    text=lambda: answer.tail,
                ),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        if watch.end is not None:
            return watch.end
        last, choice = answer.finish()
        if last is not None:
            task.handle.publish(last)
        return Finished((choice,), prompt_tokens)

    def _on_device(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move to the model's device; pixels also take its type."""
        device, dtype = self._loaded.device, self._loaded.dtype
        return {
            name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in tensors.items()
        }

    @contextmanager
    def _seeded(self, seed: int | None) -> Iterator[None]:
        """Sample with a state of our own: what ran before does not change a seeded answer."""
        device = self._loaded.device
        with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
            torch.manual_seed(secrets.randbits(63) if seed is None else seed)
            yield


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Sees each token as it comes: publishes it, and says when to stop."""

    def __init__(
        self, task: Task, answer: Answer, between_tokens: Callable[[Task], Outcome | None]
    ) -> None:
        self.end: Outcome | None = None
        """What ended the answer before it was complete, if anything did."""
        self._task = task
        self._answer = answer
        self._between_tokens = between_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        event = self._answer.append(int(input_ids[0, -1]))
        if event is not None:
            self._task.handle.publish(event)
        stop = self._answer.stopped
        if not stop:
            self.end = self._between_tokens(self._task)
            stop = self.end is not None
        return torch.tensor([stop], device=input_ids.device)
