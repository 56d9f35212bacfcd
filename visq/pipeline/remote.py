"""`RemotePipeline`: LMDeploy's call forms over a visq server; its workers have the model.

One prompt is a job, many are batches, a conversation is a session of the server. What dies on the
way (a worker, a connection) is the server's and the client's business: the answer comes later.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Literal

from visq.client import Batch, Client, Job
from visq.client.images import PilImage
from visq.ended import result_of
from visq.errors import (
    InvalidRequest,
    JobCancelled,
    NotFound,
    UnsupportedParameter,
    VisqError,
)
from visq.pipeline.base import Asked, BasePipeline
from visq.pipeline.generation import GenerationConfig
from visq.pipeline.prompts import Conversation, conversation, with_urls
from visq.pipeline.response import Response
from visq.pipeline.session import RequestConflict, Session
from visq.types import Choice, JobResult, JobView, Json, TextPart
from visq.vl.reading import ReadingRules, read_bytes

logger = logging.getLogger(__name__)

AT_ONCE: Final = 16
"""Jobs that are followed beside each other; uploads likewise."""

BATCH_ITEMS: Final = 500
"""Most prompts in one batch; a longer list becomes several."""

_GOES_THROUGH: Final = re.compile(r"s3://|img_[0-9a-f]{32}$")

LaneName = Literal["interactive", "standard", "batch"]


class RemotePipeline(BasePipeline):
    """A model behind the queue. Thread-safe; close it, or use it in a ``with``."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        lane: LaneName | None = None,
        allowed_media_domains: Collection[str] | None = None,
    ) -> None:
        """
        :param url: of the server; by default that of `visq.Client`.
        :param lane: for all that is asked; by default ``interactive`` for one prompt and ``batch``
            for many.
        :param allowed_media_domains: as for `visq.pipeline`; images from the web are fetched here
            and uploaded.
        :raises ConfigurationError: nothing says which server.
        """
        self._client = Client(url, api_key)
        self._lane = lane
        self._rules = ReadingRules.from_settings(allowed_domains=allowed_media_domains)

    @property
    def client(self) -> Client:
        """What it talks through."""
        return self._client

    def session(self) -> Session:
        """A new session; the server knows it from its first turn on, under its `session_id`. Its
        `close` deletes it there."""
        return Session("", self._delete)

    def get_ppl(self, input_ids: list[int] | list[list[int]]) -> list[float]:
        """:raises UnsupportedParameter: always: a job's prompt is text, not tokens."""
        raise UnsupportedParameter("`get_ppl` needs the model in this program: `visq.pipeline`")

    def close(self) -> None:
        self._client.close()

    def _answers(self, asked: Sequence[Asked]) -> Generator[Response]:
        if len(asked) > 1 and all(each.session is None for each in asked):
            yield from self._in_batches(asked)
            return
        for update in self._beside(asked, stream=False):
            yield update.piece

    def _pieces(self, asked: Sequence[Asked]) -> Generator[Response]:
        for update in self._beside(asked, stream=True):
            yield update.piece

    def _turn(self, session: Session, asked: Asked, *, stream: bool) -> Generator[Response]:
        with session.turn(asked.prompt) as turn:
            jobs = _Jobs()
            turn.abort = jobs.cancel
            with closing(self._follow([asked], jobs, session, stream=stream)) as updates:
                for update in updates:
                    if update.whole is not None:
                        good = update.whole.finish_reason in ("stop", "length")
                        (turn.succeeded if good else turn.failed)(update.whole)
                    yield update.piece

    # --- jobs, beside each other ---------------------------------------------------------------

    def _beside(self, asked: Sequence[Asked], *, stream: bool) -> Generator[_Update]:
        """Each prompt as a job; what comes of them, as it comes."""
        with ExitStack() as stack:
            jobs = _Jobs()
            ready: list[Asked] = []
            places: list[int] = []
            for index, each in enumerate(asked):
                if each.session is not None:
                    try:
                        turn = stack.enter_context(each.session.turn(each.prompt))
                    except RequestConflict as error:
                        yield _Update.of_end(Response.of_error(error, index))
                        continue
                    turn.abort = partial(jobs.cancel, len(ready))
                ready.append(each)
                places.append(index)
            updates = stack.enter_context(closing(self._follow(ready, jobs, None, stream=stream)))
            for update in updates:
                update.piece.index = places[update.piece.index]
                yield update

    def _follow(
        self, asked: Sequence[Asked], jobs: _Jobs, session: Session | None, *, stream: bool
    ) -> Generator[_Update]:
        """:param session: whose next turn the (one) prompt is."""
        updates: SimpleQueue[_Update] = SimpleQueue()

        def follow(index: int) -> None:
            try:
                self._follow_one(index, asked[index], jobs, session, stream, updates)
            except JobCancelled:
                updates.put(_Update.of_end(Response("", 0, 0, finish_reason="abort", index=index)))
            except VisqError as error:
                updates.put(_Update.of_end(Response.of_error(error, index)))
            except Exception:
                logger.exception("prompt %d failed", index)
                failure = VisqError("the prompt could not be sent; the log says more")
                updates.put(_Update.of_end(Response.of_error(failure, index)))

        pool = ThreadPoolExecutor(min(AT_ONCE, max(1, len(asked))), "visq-remote")
        try:
            for index in range(len(asked)):
                pool.submit(follow, index)
            left = len(asked)
            while left:
                update = updates.get()
                left -= update.whole is not None
                yield update
        finally:
            jobs.cancel()
            pool.shutdown(wait=False, cancel_futures=True)

    def _follow_one(
        self,
        index: int,
        asked: Asked,
        jobs: _Jobs,
        session: Session | None,
        stream: bool,
        updates: SimpleQueue[_Update],
    ) -> None:
        fields = self._fields(asked)
        if self._lane is not None:
            fields["lane"] = self._lane
        if session is None:
            fields["kind"] = "generate"
        else:
            session.session_id = session.session_id or self._client.sessions.create().id
            fields["session_id"] = session.session_id
        prompt = fields.pop("prompt", None)
        job = jobs.add(index, self._client.jobs.submit(prompt, **fields))
        if stream:
            for text in job.stream():
                updates.put(_Update(Response(text, 0, 0, index=index)))
        whole = _response(job.wait(), index)
        jobs.ended(index)
        updates.put(_Update.of_end(whole, shown=stream))

    # --- batches -------------------------------------------------------------------------------

    def _in_batches(self, asked: Sequence[Asked]) -> Generator[Response]:
        """Whole answers, in order but for those that could not be sent."""
        sent: list[tuple[list[int], Batch]] = []
        try:
            for start in range(0, len(asked), BATCH_ITEMS):
                numbers = range(start, min(start + BATCH_ITEMS, len(asked)))
                with ThreadPoolExecutor(AT_ONCE, "visq-remote") as pool:
                    made = list(pool.map(lambda n: self._fields_or_error(n, asked[n]), numbers))
                yield from (each for each in made if isinstance(each, Response))
                items = [
                    (number, fields)
                    for number, fields in zip(numbers, made, strict=True)
                    if not isinstance(fields, Response)
                ]
                try:
                    if items:
                        sent.append(([number for number, _ in items], self._submit(items)))
                except VisqError as error:
                    if error.retryable:
                        raise
                    # One item that the server refuses is that item's own failure.
                    alone = [asked[number] for number, _ in items]
                    with closing(self._beside(alone, stream=False)) as updates:
                        for update in updates:
                            update.piece.index = items[update.piece.index][0]
                            yield update.piece
            while sent:
                numbers_sent, batch = sent[0]
                for number, view in zip(numbers_sent, batch.results(), strict=True):
                    yield _response_or_error(view, number)
                sent.pop(0)
        finally:
            for _, batch in sent:
                batch.cancel()

    def _submit(self, items: Sequence[tuple[int, Json]]) -> Batch:
        bodies = [{"custom_id": str(number), **fields} for number, fields in items]
        if self._lane is None:
            return self._client.batches.submit(bodies)
        return self._client.batches.submit(bodies, lane=self._lane)

    def _fields_or_error(self, index: int, asked: Asked) -> Json | Response:
        try:
            return self._fields(asked)
        except VisqError as error:
            return Response.of_error(error, index)

    # --- what is sent --------------------------------------------------------------------------

    def _fields(self, asked: Asked) -> Json:
        """The prompt as fields of a job or a batch item, its images uploaded."""
        _check(asked.gen_config)
        said = conversation(asked.prompt)
        urls = [self._url(image) for image in said.images]
        fields: Json = {
            "gen_config": asked.gen_config.as_json_form().model_dump(exclude_unset=True)
        }
        if asked.adapter_name is not None:
            fields["adapter_name"] = asked.adapter_name
        if asked.do_preprocess:
            messages = with_urls(said, urls)
            # As dicts, with the parts' types: only what was given goes over the wire.
            return fields | {"messages": [m.model_dump(exclude_none=True) for m in messages]}
        return fields | {"do_preprocess": False, "prompt": _raw(said), "images": urls}

    def _url(self, image: Any) -> str:
        """The name of an image on the server; what it does not know is uploaded."""
        if isinstance(image, str) and _GOES_THROUGH.match(image):
            return image
        if isinstance(image, str | os.PathLike):
            return self._client.images.upload(read_bytes(image, self._rules)).id
        if isinstance(image, PilImage):
            from visq.vl.encoding import as_png

            return self._client.images.upload(as_png(image)).id  # type: ignore[arg-type]
        raise InvalidRequest(
            f"an image is a path, a URL or a PIL image, not {type(image).__name__}"
        )

    def _delete(self, session: Session) -> None:
        if session.session_id:
            with suppress(NotFound):  # deleted before
                self._client.sessions.delete(str(session.session_id))
            session.session_id = ""


@dataclass(frozen=True, slots=True)
class _Update:
    """Something new of a prompt."""

    piece: Response
    whole: Response | None = None
    """The whole answer, with the last piece."""

    @classmethod
    def of_end(cls, whole: Response, *, shown: bool = False) -> _Update:
        """:param shown: its text was given out in pieces."""
        if not shown:
            return cls(whole, whole)
        return cls(replace(whole, text=""), whole)


class _Jobs:
    """The jobs of a call that have not ended, by the index of their prompt."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, Job] = {}
        self._cancelled: set[int] = set()
        self._all_cancelled = False

    def add(self, index: int, job: Job) -> Job:
        with self._lock:
            self._running[index] = job
            late = self._all_cancelled or index in self._cancelled
        if late:
            job.cancel()
        return job

    def ended(self, index: int) -> None:
        with self._lock:
            self._running.pop(index, None)

    def cancel(self, index: int | None = None) -> None:
        """Cancel one job, or all of them, also those that are yet to be submitted."""
        with self._lock:
            if index is None:
                self._all_cancelled = True
            else:
                self._cancelled.add(index)
            jobs = [job for n, job in self._running.items() if index in (None, n)]
        for job in jobs:
            try:
                job.cancel()
            except VisqError as error:  # it has just ended, or the server is away
                logger.info("job %s could not be cancelled: %s", job.id, error)


def _check(config: GenerationConfig) -> None:
    """:raises UnsupportedParameter: naming what cannot go through a queue, or not come back."""
    asked = {
        "logits_processors": bool(config.logits_processors),
        "output_logits": config.output_logits is not None,
    }
    for name, wanted in asked.items():
        if wanted:
            raise UnsupportedParameter(
                f"`{name}` needs the model in this program (`visq.pipeline`): functions and "
                "logits do not go through a queue",
                param=f"gen_config.{name}",
            )


def _raw(said: Conversation) -> str:
    texts = [part.text for m in said.messages for part in m.parts() if isinstance(part, TextPart)]
    return "".join(texts)


def _response(view: JobView, index: int) -> Response:
    """:raises VisqError: why there is no answer."""
    result = result_of(view)
    found = [
        _of_choice(result, choice, index, number)
        for number, choice in enumerate(result.choices or [result])
    ]
    first = found[0]
    if result.token_ids is None:  # then the result says only how many all choices have
        first.generate_token_len = result.usage.completion_tokens
    first.choices = found if len(found) > 1 else []
    return first


def _of_choice(result: JobResult, choice: Choice, index: int, number: int) -> Response:
    token_ids = choice.token_ids or []
    return Response(
        text=choice.text,
        generate_token_len=len(token_ids),
        input_token_len=result.usage.prompt_tokens,
        finish_reason=choice.finish_reason,
        token_ids=token_ids,
        logprobs=choice.logprobs,
        index=index,
        cached_tokens=result.usage.cached_tokens,
        choice=number,
        ppl=result.ppl,
    )


def _response_or_error(view: JobView, index: int) -> Response:
    try:
        return _response(view, index)
    except JobCancelled:
        return Response("", 0, 0, finish_reason="abort", index=index)
    except VisqError as error:
        return Response.of_error(error, index)
