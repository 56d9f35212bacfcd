"""`Pipeline`: an engine in this program, behind LMDeploy's call forms."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from visq.errors import ConfigurationError, EngineError, JobCancelled
from visq.exact import exact_ids
from visq.pipeline.base import Asked, BasePipeline
from visq.pipeline.collecting import Collector, whole
from visq.pipeline.configs import (
    ChatTemplateConfig,
    PytorchEngineConfig,
    SpeculativeConfig,
    TurbomindEngineConfig,
    VisionConfig,
)
from visq.pipeline.flight import Engine, Flight, Prepare, release
from visq.pipeline.generation import GenerationConfig, with_stop_words
from visq.pipeline.mapping import check_template, engine_config
from visq.pipeline.prompts import (
    Conversation,
    PromptError,
    answer,
    conversation,
    joined,
    with_system,
)
from visq.pipeline.response import Response
from visq.pipeline.session import RequestConflict, Session, Turn
from visq.pixels import PixelBuffer
from visq.vl.pictures import Picture, load_picture
from visq.vl.reading import ReadingRules
from worker.engine.face import EngineRequest, Failed, Finished, TokenEvent
from worker.engine.opening import open_engine

if TYPE_CHECKING:
    from worker.engine.config import EngineConfig

PREPARERS: Final = 4
"""Threads that fetch and decode pictures."""


class Pipeline(BasePipeline):
    """A model in this program. Thread-safe; close it, or use it in a ``with``."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        backend_config: TurbomindEngineConfig | PytorchEngineConfig | EngineConfig | None = None,
        chat_template_config: ChatTemplateConfig | None = None,
        log_level: str = "WARNING",
        max_log_len: int | None = None,
        trust_remote_code: bool = False,
        speculative_config: SpeculativeConfig | None = None,
        allowed_media_domains: Collection[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a model; `visq.pipeline.pipeline` says what the arguments mean."""
        del max_log_len, trust_remote_code  # prompts are not logged; a model's code is never run
        _check(speculative_config, kwargs)
        check_template(chat_template_config)
        for name in ("visq", "worker"):
            _set_level(name, log_level)
        config = engine_config(os.fspath(model_path), backend_config, log_level)
        self._set_up(open_engine(config), chat_template_config, allowed_media_domains)

    @classmethod
    def over(
        cls,
        engine: Engine,
        chat_template_config: ChatTemplateConfig | None = None,
        allowed_media_domains: Collection[str] | None = None,
    ) -> Pipeline:
        """A pipeline on an engine that runs already; `close` closes it."""
        check_template(chat_template_config)
        made = cls.__new__(cls)
        made._set_up(engine, chat_template_config, allowed_media_domains)
        return made

    def _set_up(
        self,
        engine: Engine,
        template: ChatTemplateConfig | None,
        allowed_media_domains: Collection[str] | None,
    ) -> None:
        self._engine = engine
        self._system = template.meta_instruction if template else None
        self._stop_words = (template.stop_words if template else None) or []
        self._rules = ReadingRules.from_settings(allowed_domains=allowed_media_domains)
        self._pool = ThreadPoolExecutor(PREPARERS, thread_name_prefix="visq-pipeline")
        self._numbers = itertools.count()

    @property
    def engine(self) -> Engine:
        """What answers: `worker.engine.face.Engine`."""
        return self._engine

    def session(self) -> Session:
        return Session(next(self._numbers))

    def get_ppl(self, input_ids: list[int] | list[list[int]]) -> list[float]:
        """Score prompts that are given as tokens; more in `BasePipeline`.

        :raises UnsupportedParameter: this engine cannot score prompts.
        """
        flight = self._fly([partial(_scored, ids) for ids in _lists_of_tokens(input_ids)])
        scores: dict[int, float] = {}
        with closing(flight.events()) as events:
            for index, event in events:
                if isinstance(event, TokenEvent):
                    continue
                scores[index] = _score(event)
        return [scores[index] for index in range(len(scores))]

    def close(self) -> None:
        self._engine.close()
        self._pool.shutdown(wait=False)

    def _answers(self, asked: Sequence[Asked]) -> Generator[Response]:
        for index, event in self._events(asked):
            if isinstance(event, Response):
                yield event
            elif not isinstance(event, TokenEvent):
                yield whole(event, index)

    def _pieces(self, asked: Sequence[Asked]) -> Generator[Response]:
        collector = Collector()
        for index, event in self._events(asked):
            if isinstance(event, Response):
                yield event
            else:
                yield from collector.pieces(index, event)

    def _events(self, asked: Sequence[Asked]) -> Generator[tuple[int, Any]]:
        """What happens to the prompts; a `Response` for those whose session is busy."""
        with ExitStack() as stack:
            ready: list[tuple[int, Prepare]] = []
            turns: list[tuple[int, Turn]] = []
            for index, each in enumerate(asked):
                if each.session is not None:
                    try:
                        turn = stack.enter_context(each.session.turn(each.prompt))
                    except RequestConflict as error:
                        yield index, Response.of_error(error, index)
                        continue
                    turns.append((len(ready), turn))
                ready.append((index, partial(self._prepare, each)))
            flight = self._fly([prepare for _, prepare in ready])
            for place, turn in turns:
                turn.abort = partial(flight.cancel, place)
            for place, event in stack.enter_context(closing(flight.events())):
                yield ready[place][0], event

    def _turn(self, session: Session, asked: Asked, *, stream: bool) -> Generator[Response]:
        collector = Collector()
        with session.turn(asked.prompt) as turn:
            flight = self._fly([partial(self._prepare, asked, session)])
            turn.abort = flight.cancel
            with closing(flight.events()) as events:
                for _, event in events:
                    pieces = collector.pieces(0, event)
                    if not isinstance(event, TokenEvent):
                        response = collector.whole(0, event)
                        if isinstance(event, Finished):
                            turn.succeeded(response, self._exact_ids(response, asked))
                        else:
                            turn.failed(response)
                    if stream:
                        yield from pieces

    def _exact_ids(self, response: Response, asked: Asked) -> list[int] | None:
        config = with_stop_words(asked.gen_config, self._stop_words)
        return exact_ids(response.token_ids, response.finish_reason, config)

    def _fly(self, items: Sequence[Prepare]) -> Flight:
        # One more than it holds: the engine need not wait while the next one is prepared.
        limit = self._engine.info.capacity + 1
        return Flight(self._engine, self._pool, items, limit)

    def _prepare(self, asked: Asked, session: Session | None = None) -> EngineRequest:
        """The engine's request for a prompt, with the history of its session before it."""
        turns, answers = _history(session)
        said = joined([*turns, conversation(asked.prompt)])
        if asked.do_preprocess:
            told = with_system(said, self._system)
            shift = len(told.messages) - len(said.messages)
            said, answers = told, {index + shift: ids for index, ids in answers.items()}
        config = with_stop_words(asked.gen_config, self._stop_words)
        return EngineRequest(
            id=f"pipeline-{next(self._numbers)}",
            messages=said.messages,
            images=self._pixels(said.images, session),
            gen_config=config.as_json_form(),
            do_preprocess=asked.do_preprocess,
            adapter_name=asked.adapter_name,
            goes_on=session is not None,
            answer_ids=answers,
            logits_processors=tuple(config.logits_processors or ()),
        )

    def _pixels(self, sources: Sequence[Any], session: Session | None) -> list[PixelBuffer]:
        """Pictures in shared memory; whoever has the request releases them."""
        buffers: list[PixelBuffer] = []
        try:
            for source in sources:
                picture = self._picture(source, session)
                buffers.append(PixelBuffer.create(picture.array, picture.sha256))
        except BaseException:
            release(buffers)
            raise
        return buffers

    def _picture(self, source: Any, session: Session | None) -> Picture:
        """A session's history shows what was shown, even if a URL leads elsewhere by now."""
        if session is None or not isinstance(source, str | os.PathLike):
            return load_picture(source, self._rules)
        name = os.fspath(source)
        if name not in session.pictures:
            session.pictures[name] = load_picture(source, self._rules)
        picture: Picture = session.pictures[name]
        return picture


def _check(speculative_config: object, kwargs: dict[str, Any]) -> None:
    vision = kwargs.pop("vision_config", None)
    if vision is not None and not isinstance(vision, VisionConfig):
        raise ConfigurationError(f"`vision_config` is a VisionConfig, not {type(vision).__name__}")
    if speculative_config is not None:
        raise ConfigurationError(
            "`speculative_config` cannot be honoured: visq has no speculative decoding; leave it "
            "out"
        )
    for name in kwargs:
        raise ConfigurationError(f"`pipeline` has no argument `{name}`; leave it out")


def _set_level(logger: str, level: str) -> None:
    try:
        logging.getLogger(logger).setLevel(level)
    except ValueError:
        raise ConfigurationError(
            f"`log_level` is DEBUG, INFO, WARNING, ERROR or CRITICAL, not {level!r}"
        ) from None


def _history(session: Session | None) -> tuple[list[Conversation], dict[int, list[int]]]:
    """What was said so far; and for its answers, by their message's index, the exact tokens."""
    turns: list[Conversation] = []
    exact: dict[int, list[int]] = {}
    for number, (asked, said) in enumerate(session.history if session else ()):
        turns += [conversation(asked), answer(said)]
        text, ids = session.token_ids.get(number, ("", [])) if session else ("", [])
        if ids and text == said:
            exact[sum(len(turn.messages) for turn in turns) - 1] = ids
    return turns, exact


def _lists_of_tokens(input_ids: Any) -> list[list[int]]:
    """:raises ValueError: not one or many lists of at least two tokens."""
    single = isinstance(input_ids, list) and bool(input_ids) and isinstance(input_ids[0], int)
    many = [input_ids] if single else input_ids
    if not isinstance(many, list) or not all(
        isinstance(ids, list) and len(ids) > 1 and all(isinstance(token, int) for token in ids)
        for ids in many
    ):
        raise PromptError(
            "`input_ids` is a list of at least two token ids, or a list of such lists",
            param="input_ids",
        )
    return many


def _scored(ids: list[int]) -> EngineRequest:
    return EngineRequest(
        id="ppl",
        messages=[],
        gen_config=GenerationConfig(max_new_tokens=1, return_ppl=True).as_json_form(),
        prompt_ids=ids,
    )


def _score(outcome: Any) -> float:
    if isinstance(outcome, Failed):
        raise outcome.error
    if not isinstance(outcome, Finished):
        raise JobCancelled("the scoring was cancelled")
    if outcome.ppl is None:
        raise EngineError("the engine gave no perplexity")
    return outcome.ppl
