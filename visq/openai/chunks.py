"""A job's token stream as the chunks of a streamed chat completion.

The first chunk of each choice has its role, those that follow have new text, and the last one has
its `finish_reason`; log probabilities come with it, all at once, as only the ended job knows them.
"""

from __future__ import annotations

from collections.abc import Callable

from visq.ended import result_of
from visq.errors import EngineCrashed
from visq.openai.answers import choices_of, chunk, delta, logprobs_of
from visq.told import Told, ToldOtherwise
from visq.types import JobView, Json


class Chunks:
    """What to send for each thing that is heard of a job."""

    def __init__(
        self, job: JobView, model: str, *, n: int, top_logprobs: int, include_usage: bool
    ) -> None:
        """
        :param n: number of choices.
        :param top_logprobs: how many alternatives of each token were asked for.
        """
        self._job = job
        self._model = model
        self._told = [Told() for _ in range(n)]
        self._top_logprobs = top_logprobs
        self._include_usage = include_usage
        self._attempt = 0

    def begin(self) -> list[Json]:
        """The answer begins."""
        role = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(delta(index, role)) for index in range(len(self._told))]

    def attempt(self, number: int) -> None:
        """A worker begins to answer."""
        self._attempt = number
        for told in self._told:
            told.begin()

    def token(self, attempt: int, index: int, text: str) -> list[Json]:
        """It says `text` in the choice `index`.

        :raises EngineCrashed: it says something else than a worker that died has said before.
        """
        if attempt < self._attempt:
            return []  # a run that has lost its job speaks on until it knows
        return self._new(index, self._told[index].say, text)

    def end(self, job: JobView) -> list[Json]:
        """The job has ended.

        :raises VisqError: why there is no answer.
        """
        result = result_of(job)
        chunks = []
        for index, choice in enumerate(choices_of(result)):
            chunks += self._new(index, self._told[index].end, choice.text)
            last = delta(
                index,
                {},
                logprobs=logprobs_of(choice, self._top_logprobs),
                finish_reason=choice.finish_reason,
            )
            chunks.append(self._chunk(last))
        if self._include_usage:
            chunks.append(chunk(self._job, self._model, usage=result.usage, tells_usage=True))
        return chunks

    def _new(self, index: int, told: Callable[[str], str], text: str) -> list[Json]:
        try:
            new = told(text)
        except ToldOtherwise:
            raise EngineCrashed(
                "the worker that answered has died, and the next one answers otherwise; ask again"
            ) from None
        return [self._chunk(delta(index, {"content": new}))] if new else []

    def _chunk(self, what: Json) -> Json:
        return chunk(self._job, self._model, what, tells_usage=self._include_usage)
