"""From a request to sequences: its prompt as tokens, its pictures prepared, its sampling resolved.

Runs in threads beside the model. Whatever is wrong with a request is found here, and is its own.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visq.errors import EngineError, UnsupportedParameter, VisqError
from visq.types import Lane
from worker.engine import params
from worker.engine.adapters import Adapter, Adapters
from worker.engine.answering import Answering
from worker.engine.face import EngineImage, EngineRequest, KnownImage
from worker.engine.families.base import Family, PreparedImage
from worker.engine.generation import Generation
from worker.engine.grammar import GrammarCompiler
from worker.engine.keys import image_key, root_key
from worker.engine.lanes import LaneQueue, Task
from worker.engine.loading import LoadedModel
from worker.engine.prompt import PromptBuilder, expand
from worker.engine.repetition import NgramRepetition
from worker.engine.sequence import ImageSpan, Sequence, placeholder_runs

logger = logging.getLogger(__name__)

SIZES: Final = 4096
"""Sizes of pictures whose placeholders are remembered."""

LOADERS: Final = 8
"""Known pictures whose pixels are loaded at a time."""


@dataclass(eq=False, slots=True)
class Running:
    """A request that the scheduler knows."""

    task: Task
    prompt_tokens: int
    generations: list[Generation]
    prompt_logits: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """By the index of the first token, if they are kept."""
    first_token_at: float | None = None
    """On the clock of :func:`time.monotonic`."""
    nll: dict[int, float] = field(default_factory=dict)
    """Negative log likelihood of each token of the prompt, if its perplexity is asked for."""

    @property
    def first(self) -> Sequence:
        return self.generations[0].sequence


class Intake:
    """Turns waiting requests into `Running` ones, better lanes first."""

    def __init__(
        self,
        loaded: LoadedModel,
        family: Family,
        adapters: Adapters,
        deliver: Callable[[Task, Running | VisqError], None],
        *,
        max_context: int,
        prepared_bytes: int,
        is_cached: Callable[[bytes], bool],
        threads: int = 1,
    ) -> None:
        """
        :param deliver: takes each request when it is ready, or what is wrong with it; called in
            threads of ours.
        :param prepared_bytes: prepared pixels that may wait for their encoding; beyond it no
            further request is prepared.
        :param is_cached: whether the features of a picture are known, so that its pixels need not
            be prepared.
        """
        self._loaded = loaded
        self._family = family
        self._adapters = adapters
        self._deliver = deliver
        self._is_cached = is_cached
        self._prompts = PromptBuilder(
            loaded.name, loaded.processor, takes_images=loaded.takes_images
        )
        self._answering = Answering(loaded, max_context)
        self._grammars = GrammarCompiler(loaded.tokenizer, loaded.vocab_size, loaded.end_ids)
        self._sizes: dict[tuple[int, int], PreparedImage] = {}
        self._room = _Room(prepared_bytes)
        self._arrivals = 0
        self._lock = threading.Lock()
        self.waiting = LaneQueue()
        self._again = ThreadPoolExecutor(LOADERS, "visq-prepare-again")
        self._threads = [
            threading.Thread(target=self._work, name=f"visq-prepare-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> list[Task]:
        """End the threads; returns the requests that were waiting for them."""
        left = self.waiting.close()
        self._room.open()
        self._again.shutdown(cancel_futures=True)
        for thread in self._threads:
            thread.join()
        return left

    def prepare_again(
        self, image: EngineImage, then: Callable[[PreparedImage | VisqError], None]
    ) -> None:
        """Prepare a picture whose pixels are not there: the model must see it once more."""

        def work() -> None:
            try:
                buffer = image.load() if isinstance(image, KnownImage) else image
                prepared = self._family.prepare_image(buffer.array())
            except VisqError as error:
                then(error)
            except Exception:
                logger.exception("a picture cannot be prepared again")
                then(EngineError("a picture cannot be prepared again; the engine's log says more"))
            else:
                self._room.hold(prepared)
                then(prepared)

        self._again.submit(work)

    def _work(self) -> None:
        while (task := self.waiting.take()) is not None:
            try:
                self._deliver(task, self._build(task))
            except VisqError as error:
                self._deliver(task, error)
            except Exception:
                logger.exception("request %s failed", task.request.id)
                self._deliver(
                    task, EngineError("the engine failed on this request; its log says more")
                )

    def _build(self, task: Task) -> Running:
        """The request's adapter is held for it until its outcome."""
        name = task.request.adapter_name
        adapter = None if name is None else self._adapters.acquire(name)
        try:
            return self._build_for(task, adapter)
        except BaseException:
            if adapter is not None:
                self._adapters.release(adapter)
            raise

    def _build_for(self, task: Task, adapter: Adapter | None) -> Running:
        request = task.request
        config = request.gen_config
        params.check(config, self._loaded.vocab_size, self._loaded.end_ids)
        token_ids = self._prompts.tokens(
            request.messages,
            images=len(request.images),
            do_preprocess=request.do_preprocess,
            answer_ids=request.answer_ids,
        )
        if request.images:
            self._room.wait()
        images = [self._prepare(request, buffer) for buffer in request.images]
        placeholder = self._family.image_token_id
        spans: list[ImageSpan] = []
        if placeholder is not None:
            token_ids, places = expand(token_ids, placeholder, [p.token_ids for p in images])
            for index, (start, length) in enumerate(places):
                buffer, end = request.images[index], start + length
                spans.append(
                    ImageSpan(
                        start,
                        end,
                        _key(request, buffer),
                        placeholder_runs(token_ids, start, end, placeholder),
                        index,
                        images[index] if "pixel_values" in images[index].tensors else None,
                    )
                )
        prompt_tokens = len(token_ids)
        max_tokens = prompt_tokens + self._answering.room(prompt_tokens, config.max_new_tokens)
        positions, delta = self._family.positions(token_ids, [p.without_pixels() for p in images])
        with self._lock:
            self._arrivals += 1
            arrival = self._arrivals
        lane = list(Lane).index(request.lane)
        wants_prompt_logits = config.return_ppl or config.output_logits == "all"
        stop_ids = self._answering.stop_ids(config)
        choices = params.resolve(
            config,
            vocab_size=self._loaded.vocab_size,
            end_ids=self._loaded.end_ids,
            stop_ids=stop_ids,
        )
        grammar = self._grammars.compile(config.response_format)
        generations = []
        for index, sampling in enumerate(choices):
            sequence = Sequence(
                order=(lane, arrival, index),
                token_ids=list(token_ids),
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                positions=positions,
                delta=delta,
                # (The other choices come when the first has left the prompt in the cache.)
                images=spans if index == 0 else [_without_pixels(span) for span in spans],
                root=root_key("kv", request.cache_salt, adapter.digest if adapter else ""),
                adapter=adapter,
                wants_prompt_logits=wants_prompt_logits and index == 0,
            )
            generation = Generation(
                sequence,
                sampling,
                self._answering.answer(config, index),
                bad_words=self._answering.bad_words(config),
                grammar=None if grammar is None else grammar.start(stop_ids),
                repetition=NgramRepetition(
                    config.repetition_ngram_size, config.repetition_ngram_threshold
                ),
                processors=request.logits_processors,
                keep_logits=config.output_logits is not None,
            )
            sequence.needs_feedback = generation.needs_feedback
            generations.append(generation)
        return Running(task, prompt_tokens, generations)

    def _prepare(self, request: EngineRequest, image: EngineImage) -> PreparedImage:
        """The picture's tokens; and its pixels, if they are at hand and may be needed."""
        if self._family.image_token_id is None:
            raise UnsupportedParameter(
                f"the model {self._loaded.name} takes no images", param="messages"
            )
        size = (image.height, image.width)
        known = self._sizes.get(size)
        if isinstance(image, KnownImage):
            if known is None:
                # Any picture of this size has these tokens.
                blank = np.zeros((*size, 3), dtype=np.uint8)
                known = self._remember(size, self._family.prepare_image(blank))
            return known
        if known is not None and self._is_cached(_key(request, image)):
            return known
        prepared = self._family.prepare_image(image.array())
        self._remember(size, prepared)
        self._room.hold(prepared)
        return prepared

    def _remember(self, size: tuple[int, int], prepared: PreparedImage) -> PreparedImage:
        if len(self._sizes) >= SIZES:
            self._sizes.clear()
        self._sizes[size] = known = prepared.without_pixels()
        return known


class _Room:
    """Memory for prepared pictures: who would add some waits until the limit is not reached.

    (It can be passed by what one request holds: waiting in the middle of a request, for what only
    itself can give back, would be for ever.)
    """

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes
        self._changed = threading.Condition(threading.RLock())  # finalizers run anywhere
        self._open = False

    def wait(self) -> None:
        with self._changed:
            while self._left <= 0 and not self._open:
                self._changed.wait()

    def hold(self, prepared: PreparedImage) -> None:
        """Count `prepared` for as long as anybody refers to it."""
        nbytes = prepared.nbytes
        self._add(-nbytes)
        weakref.finalize(prepared, self._add, nbytes).atexit = False

    def open(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def _add(self, nbytes: int) -> None:
        with self._changed:
            self._left += nbytes
            self._changed.notify_all()


def _key(request: EngineRequest, image: EngineImage) -> bytes:
    return image_key(request.cache_salt, image.sha256, image.height, image.width)


def _without_pixels(span: ImageSpan) -> ImageSpan:
    return ImageSpan(span.start, span.end, span.key, span.runs, span.index)
