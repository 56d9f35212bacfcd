"""From a request to sequences: its prompt as tokens, its pictures prepared, its sampling resolved.

Runs in threads beside the model. Whatever is wrong with a request is found here, and is its own.
"""

from __future__ import annotations

import logging
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visq.errors import (
    EngineError,
    ImageChanged,
    InvalidRequest,
    UnsupportedParameter,
    VisqError,
)
from visq.pixels import PixelBuffer
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

SIZES_TOKENS: Final = 1 << 20
"""Placeholders of pictures of known sizes that are remembered, some 40 bytes each."""

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
        self._sizes_tokens = 0
        self._prepared: weakref.WeakValueDictionary[bytes, PreparedImage] = (
            weakref.WeakValueDictionary()
        )
        """Pictures that wait for their encoding, for others who show the same ones."""
        self._arrivals = 0
        self._lock = threading.Lock()
        self.waiting = LaneQueue()
        self._room = _Room(prepared_bytes, self.waiting.changed)
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
        # Not waited for: the loading of a picture is the caller's code, and may block.
        self._again.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            thread.join()
        return left

    def prepare_again(
        self,
        image: EngineImage,
        then: Callable[[PreparedImage | VisqError], None],
        wanted: Callable[[], bool],
    ) -> None:
        """Prepare a picture whose pixels are not there: the model must see it once more.

        :param wanted: looked at when its turn comes; if it is not, `then` is called with an error.
        """

        def work() -> None:
            try:
                if not wanted():
                    raise EngineError("the request has ended")
                buffer = _load(image) if isinstance(image, KnownImage) else image
                prepared = self._family.prepare_image(buffer.array())
            except VisqError as error:
                then(_without_frames(error))
            except BaseException:
                logger.exception("a picture cannot be prepared again")
                then(EngineError("a picture cannot be prepared again; the engine's log says more"))
            else:
                self._room.hold(prepared)
                then(prepared)

        self._again.submit(work)

    def _work(self) -> None:
        while (task := self.waiting.take(self._has_room_for)) is not None:
            try:
                self._deliver(task, self._build(task))
            except VisqError as error:
                self._deliver(task, _without_frames(error))
            except BaseException:  # a panic in a library in Rust is no Exception
                logger.exception("request %s failed", task.request.id)
                self._deliver(
                    task, EngineError("the engine failed on this request; its log says more")
                )

    def _has_room_for(self, task: Task) -> bool:
        return not task.request.images or not self._room.full

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
        token_ids = self._token_ids(request)
        images: list[PreparedImage] = []
        least = len(token_ids)
        for image in request.images:
            images.append(self._prepare(request, image))
            least += len(images[-1].token_ids) - 1
            # Not first when all of them have taken their memory.
            self._answering.room(least, config.max_new_tokens)
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
        bad_words = self._answering.bad_words(config)
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
                bad_words=bad_words,
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

    def _token_ids(self, request: EngineRequest) -> list[int]:
        if request.prompt_ids is None:
            ids = self._prompts.tokens(
                request.messages,
                images=len(request.images),
                do_preprocess=request.do_preprocess,
                answer_ids=request.answer_ids,
            )
        else:
            ids = list(request.prompt_ids)
        if not ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self._loaded.vocab_size:
                raise InvalidRequest(
                    f"the prompt has the token {token}, but the model has only "
                    f"{self._loaded.vocab_size}",
                    param="prompt",
                )
        return ids

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
        key = _key(request, image)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._family.prepare_image(image.array())
            self._remember(size, prepared)
            self._room.hold(prepared)
            self._prepared[key] = prepared
        return prepared

    def _remember(self, size: tuple[int, int], prepared: PreparedImage) -> PreparedImage:
        known = prepared.without_pixels()
        if size not in self._sizes:
            if self._sizes_tokens > SIZES_TOKENS:
                self._sizes.clear()
                self._sizes_tokens = 0
            self._sizes[size] = known
            self._sizes_tokens += len(known.token_ids)
        return known


class _Room:
    """Memory for prepared pictures; while it is `full`, requests with pictures stay in the queue.

    (It can be passed by what one request holds: waiting in the middle of a request, for what only
    itself can give back, would be for ever.)
    """

    def __init__(self, nbytes: int, changed: threading.Condition) -> None:
        """:param changed: of an RLock, as finalizers run anywhere; notified when some is freed."""
        self._left = nbytes
        self._changed = changed

    @property
    def full(self) -> bool:
        return self._left <= 0

    def hold(self, prepared: PreparedImage) -> None:
        """Count `prepared` for as long as anybody refers to it."""
        nbytes = prepared.nbytes
        self._add(-nbytes)
        weakref.finalize(prepared, self._add, nbytes).atexit = False

    def _add(self, nbytes: int) -> None:
        with self._changed:
            self._left += nbytes
            self._changed.notify_all()


def _key(request: EngineRequest, image: EngineImage) -> bytes:
    return image_key(request.cache_salt, image.sha256, image.height, image.width)


def _load(image: KnownImage) -> PixelBuffer:
    """
    :raises ImageChanged: if it is not the picture that it was.
    """
    buffer = image.load()
    if (buffer.sha256, buffer.height, buffer.width) != (image.sha256, image.height, image.width):
        raise ImageChanged(
            "an image of the history is not the one that was shown", param="messages"
        )
    return buffer


def _without_frames(error: VisqError) -> VisqError:
    """`error`, which no longer holds what was in the functions that it came through: the caller
    may keep it for ever, and prepared pixels are among that."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    return error


def _without_pixels(span: ImageSpan) -> ImageSpan:
    return ImageSpan(span.start, span.end, span.key, span.runs, span.index)
