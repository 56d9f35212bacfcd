"""From a request to sequences: its prompt as tokens, its pictures prepared, its sampling resolved.

Runs in threads beside the model, of which one is at work at a time: they share Python with the
model's steps. With preparing processes there are several, and the others wait for their pictures.
Whatever is wrong with a request is found here, and is its own.
"""

from __future__ import annotations

import logging
import threading
import traceback
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
from worker.engine.pictures import Pictures
from worker.engine.preparing import Preparers
from worker.engine.prompt import PromptBuilder, expand
from worker.engine.repetition import NgramRepetition
from worker.engine.room import Room
from worker.engine.sequence import ImageSpan, Sequence, placeholder_runs

logger = logging.getLogger(__name__)

AT_ONCE: Final = 3
"""Requests that are prepared at a time, for each preparing process: one that its process has, and
others that have their turn here, or whose picture is the next."""

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
        preparers: Preparers | None = None,
    ) -> None:
        """
        :param deliver: takes each request when it is ready, or what is wrong with it; called in
            threads of ours.
        :param prepared_bytes: prepared pixels that may wait for their encoding; beyond it no
            further request is prepared.
        :param is_cached: whether the features of a picture are known, so that its pixels need not
            be prepared.
        :param preparers: prepare pictures in place of the intake, which closes them.
        """
        self._loaded = loaded
        self._family = family
        self._adapters = adapters
        self._deliver = deliver
        self._prompts = PromptBuilder(
            loaded.name, loaded.processor, takes_images=loaded.takes_images
        )
        self._answering = Answering(loaded, max_context)
        self._grammars = GrammarCompiler(loaded.tokenizer, loaded.vocab_size, loaded.end_ids)
        self._preparers = preparers
        self._arrivals = 0
        self._turn = threading.Lock()
        """Of the thread that is at work."""
        self.waiting = LaneQueue()
        self._room = Room(prepared_bytes, self.waiting.changed)
        self._pictures = Pictures(family, preparers, self._room, self._turn, is_cached)
        self._again = ThreadPoolExecutor(LOADERS, "visq-prepare-again")
        self._threads = [
            threading.Thread(target=self._work, name=f"visq-prepare-{index}", daemon=True)
            for index in range(1 if preparers is None else AT_ONCE * preparers.count)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> list[Task]:
        """End the threads; returns the requests that were waiting for them."""
        left = self.waiting.close()
        # Not waited for: the loading of a picture is the caller's code, and may block.
        self._again.shutdown(wait=False, cancel_futures=True)
        if self._preparers is not None:
            self._preparers.close()
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
                prepared = self._pictures.prepare(buffer)
            except VisqError as error:
                then(_without_frames(error))
            except BaseException:
                logger.exception("a picture cannot be prepared again")
                then(EngineError("a picture cannot be prepared again; the engine's log says more"))
            else:
                then(prepared)

        self._again.submit(work)

    def _work(self) -> None:
        while (task := self.waiting.take(self._admit)) is not None:
            # (Not kept in this frame, which waits for the next one: pixels may be among it.)
            self._deliver(task, self._outcome(task))

    def _outcome(self, task: Task) -> Running | VisqError:
        try:
            with self._turn:
                return self._build(task)
        except VisqError as error:
            return _without_frames(error)
        except BaseException:  # a panic in a library in Rust is no Exception
            logger.exception("request %s failed", task.request.id)
            return EngineError("the engine failed on this request; its log says more")
        finally:
            self._room.is_prepared(task)

    def _admit(self, task: Task) -> bool:
        """Whether it may be taken; if so, room is kept for its pictures until they are prepared."""
        images = task.request.images
        return not images or self._room.admit(task, sum(map(self._pictures.nbytes, images)))

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
        self._arrivals += 1
        arrival = self._arrivals
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
        if self._family.image_token_id is None:
            raise UnsupportedParameter(
                f"the model {self._loaded.name} takes no images", param="messages"
            )
        return self._pictures.prepared(_key(request, image), image)


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
