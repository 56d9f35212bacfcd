"""One run of one job, from the claim to its end: claim, look, ask, end, tell.

Everything that can go wrong in a run ends in an `Outcome`; only the loss of the claim ends it
without a write.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from queue import SimpleQueue

import structlog

from models import jobs, reading
from models.database import Database
from models.outcomes import (
    Cancelled,
    Expired,
    Failed,
    HandedBack,
    Outcome,
    Succeeded,
    Transition,
    Work,
)
from visq import points
from visq.errors import EngineDown, InternalError, Unavailable, VisqError
from visq.exact import exact_ids
from visq.settings import Settings
from visq.types import JobResult, Message
from worker.committing import Committer
from worker.company import Company
from worker.engine import face
from worker.engine.face import Engine, EngineRequest, Event, Finished, Stopped, TokenEvent
from worker.media import Media
from worker.pictures import Pictures, pictures_of
from worker.queue import Courier, Maintenance
from worker.results import result_of, storable
from worker.runs import Run, Runs
from worker.token_streams import TokenStream, TokenStreams

log = structlog.get_logger(__name__)

ENGINE_LOOK_SECONDS = 0.2
"""Time between two looks at an engine that is down."""


class Executor:
    """Runs jobs, many at a time: `run` is called from as many threads as jobs are in flight."""

    def __init__(
        self,
        settings: Settings,
        *,
        worker_id: str,
        database: Database,
        engine: Engine,
        media: Media,
        runs: Runs,
        courier: Courier,
        maintenance: Maintenance,
    ) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._database = database
        self._engine = engine
        self._media = media
        self._runs = runs
        self._courier = courier
        self._maintenance = maintenance
        self._streams = TokenStreams(courier.events)
        self._streams.start()
        self._committer = Committer(
            database, courier, self._streams, worker_id, settings.lease_seconds
        )
        self._company = Company()
        self._fetchers = ThreadPoolExecutor(settings.fetch_concurrency, "fetch")

    def run(self, job_id: str, *, alone: bool = False, urgent: bool = False) -> None:
        """Run the job if it is there to claim; a repeated message finds nothing.

        :param alone: what the message says: the job must run without others beside it.
        :param urgent: somebody waits for its start: it is not claimed together with others.
        """
        if not alone:
            company = self._company.shared(lambda: self._runs.shutting_down)
        elif self._stops_for(job_id):
            company = self._company.alone(self._no_longer(job_id))
        else:
            return
        with company as free:
            # If not, the job is still queued, and is published again.
            if free and self._engine_is_up():
                self._run(job_id, alone, urgent)

    def _run(self, job_id: str, alone: bool, urgent: bool) -> None:
        points.reached("run.taken")
        work = self._claim(job_id, alone, urgent)
        if work is None:
            log.debug("nothing to claim", job=job_id)
            return
        points.reached("run.claimed")
        stream = self._streams.begin(work.claim)
        with self._runs.holding(work.claim) as run:
            outcome = self._attempt(work, run, stream)
            transition = None if outcome is None else self._finish(run, outcome)
            run.outcome = None if transition is None else transition.job.status
        if transition is None:
            self._streams.forget(stream)
            log.warning("run lost its job; its result is thrown away", job=job_id)
            return
        points.reached("run.ended")
        log.info("job run", job=job_id, attempt=work.claim.attempt, status=transition.job.status)
        self._committer.deliver(stream, transition)
        points.reached("run.delivered")
        if work.batch_id is not None:
            self._maintenance.wake_for_windows()  # there is room in the batch's window

    def close(self) -> None:
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._committer.close()
        self._streams.close()

    def _engine_is_up(self) -> bool:
        """Wait for an engine that is down: a job claimed meanwhile would fail at once, and a worker
        without an engine would so use up the attempts of all jobs. False: the worker shuts down."""
        while not self._engine.alive:
            if self._runs.shutting_down:
                return False
            time.sleep(ENGINE_LOOK_SECONDS)
        return True

    def _no_longer(self, job_id: str) -> Callable[[], bool]:
        """Whether to stop waiting to be alone with a job: asked often, answered from time to time
        by the database."""
        looked = time.monotonic()

        def gives_up() -> bool:
            nonlocal looked
            if self._runs.shutting_down:
                return True
            if time.monotonic() - looked < self._settings.republish_seconds / 3:
                return False
            looked = time.monotonic()
            return not self._stops_for(job_id)

        return gives_up

    def _stops_for(self, job_id: str) -> bool:
        seconds = self._settings.republish_seconds
        try:
            return self._database.run(jobs.stop_for, job_id, seconds=seconds)
        except Unavailable:
            return False  # it is published again

    def _claim(self, job_id: str, alone: bool, urgent: bool) -> Work | None:
        try:
            if alone:
                return self._committer.claim_alone(job_id)
            return self._committer.claim(job_id, urgent=urgent)
        except Unavailable as error:
            self._runs.doubt_claims()  # the commit may have got through
            log.warning("not claimed; it is published again", job=job_id, error=str(error))
            return None

    def _attempt(self, work: Work, run: Run, stream: TokenStream) -> Outcome | None:
        """How the attempt ends; ``None`` if the claim was lost on the way."""
        try:
            if (answered := self._answered_before(work)) is not None:
                return Succeeded(answered, work.prompt.as_messages())
            with self._pictures(work, run) as pictures:
                if pictures is None or run.stop_reason is not None:
                    return _stopped(run, "cancelled")
                points.reached("run.shown")
                answer = self._ask(work, run, pictures, stream)
                points.reached("run.answered")
        except VisqError as refusal:
            return self._failed(refusal)
        except Exception:
            log.exception("run failed", job=work.claim.job_id)
            return self._failed(InternalError("visq failed at this job; the worker's log says why"))
        match answer:
            case Finished():
                info = self._engine.info
                result = result_of(answer, len(pictures.images), info.model)
                reply = Message(role="assistant", content=result.text)
                ids = exact_ids(answer.token_ids, answer.finish_reason, work.prompt.gen_config)
                return Succeeded(
                    result,
                    [*pictures.turn, reply],
                    answer_ids=ids if info.tokenizer else None,
                    tokenizer=info.tokenizer,
                    pictures=pictures.shown,
                )
            case face.Failed(EngineDown()):
                return HandedBack("the engine was down")
            case face.Failed(error):
                return self._failed(error)
            case Stopped(reason):
                return _stopped(run, reason)

    def _answered_before(self, work: Work) -> JobResult | None:
        if work.batch_id is None or work.dedupe_key is None:
            return None
        return self._database.read(
            reading.answered_before, work.batch_id, work.dedupe_key, work.claim.job_id
        )

    def _pictures(self, work: Work, run: Run) -> AbstractContextManager[Pictures | None]:
        return pictures_of(work, self._media, self._fetchers, lambda: run.stop_reason is not None)

    def _ask(
        self,
        work: Work,
        run: Run,
        pictures: Pictures,
        stream: TokenStream,
    ) -> face.Outcome:
        left = None if work.expires_in is None else max(work.expires_in - run.seconds(), 0.0)
        answer = _Answer(self._streams, stream)
        handle = self._engine.submit(
            EngineRequest(
                id=work.claim.job_id,
                messages=[*(remembered.message for remembered in work.history), *pictures.turn],
                images=pictures.images,
                gen_config=work.prompt.gen_config,
                do_preprocess=work.prompt.do_preprocess,
                adapter_name=work.prompt.adapter_name,
                cache_salt=work.tenant,
                goes_on=work.claim.session_id is not None,
                answer_ids=_answer_ids(work, self._engine.info.tokenizer),
                lane=work.lane,
                deadline_seconds=left,
            ),
            answer,
        )
        run.attach(handle)
        return answer.outcome()

    def _failed(self, error: VisqError) -> Failed:
        return Failed(error, self._settings.retry_backoff_seconds)

    def _finish(self, run: Run, outcome: Outcome) -> Transition | None:
        """Write the end. While the database is away, the claim is held as long as it may be valid;
        if a commit got through although its answer did not, the second try finds the claim used."""
        give_up = time.monotonic() + 2 * self._settings.lease_seconds
        while run.stop_reason != "lost":
            try:
                return self._committer.finish(run.claim, outcome)
            except Unavailable as error:
                if time.monotonic() > give_up:
                    break
                log.warning("end not written yet", job=run.claim.job_id, error=str(error))
                time.sleep(0.5)
            except Exception:
                if outcome is UNSTORABLE:
                    raise
                # The next attempt would end in the same way: better a failure than none at all.
                log.exception("end not written; the job fails", job=run.claim.job_id)
                outcome = UNSTORABLE
        return None


class _Answer:
    """Takes the events of one request: its text goes on to the stream, its outcome to the run."""

    def __init__(self, streams: TokenStreams, stream: TokenStream) -> None:
        self._streams = streams
        self._stream = stream
        self._outcome: SimpleQueue[face.Outcome] = SimpleQueue()

    def __call__(self, event: Event) -> None:
        """Called in a thread of the engine."""
        if isinstance(event, TokenEvent):
            self._streams.say(self._stream, event.index, storable(event.text))
        else:
            self._outcome.put(event)

    def outcome(self) -> face.Outcome:
        """Wait for it."""
        return self._outcome.get()


UNSTORABLE = Failed(VisqError("the end of this job cannot be stored; the worker's log says why"))


def _answer_ids(work: Work, tokenizer: str) -> dict[int, list[int]]:
    """The exact tokens of the history's answers, by their place in it, as numbers of `tokenizer`:
    to another one the same numbers mean other words."""
    return {
        index: remembered.token_ids
        for index, remembered in enumerate(work.history)
        if remembered.token_ids is not None and remembered.tokenizer == tokenizer
    }


def _stopped(run: Run, reason: str) -> Outcome | None:
    match run.stop_reason:
        case "lost":
            return None
        case "shutdown":
            return HandedBack("the worker shut down")
        case _:
            return Expired() if reason == "expired" else Cancelled()
