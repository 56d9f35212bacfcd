"""What becomes of an engine's answer: the job's result."""

from __future__ import annotations

import math
from typing import Final

from visq.types import Choice, JobResult, Usage
from worker.engine import face
from worker.engine.face import Finished, Logprobs

LOWEST_LOGPROB: Final = -9999.0
"""In place of minus infinity, for which JSON has no word; OpenAI's API says the same."""


def result_of(answer: Finished, images: int, model: str) -> JobResult:
    """The result that is stored and shown; `images`: how many the prompt had."""
    choices = [_choice(choice) for choice in answer.choices]
    ppl = answer.ppl
    return JobResult(
        **dict(choices[0]),
        usage=Usage(
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            images=images,
            cached_tokens=answer.cached_tokens,
        ),
        model=model,
        choices=choices if len(choices) > 1 else None,
        ppl=ppl if ppl is not None and math.isfinite(ppl) else None,
    )


def storable(text: str) -> str:
    """What PostgreSQL can keep: a model may say any character, but U+0000 is none there."""
    return text.replace("\0", "\ufffd")


def _choice(choice: face.Choice) -> Choice:
    logprobs = choice.logprobs
    return Choice(
        text=storable(choice.text),
        finish_reason=choice.finish_reason,
        token_ids=None if logprobs is None else choice.token_ids,
        logprobs=None if logprobs is None else [_in_json(each) for each in logprobs],
        tokens=choice.tokens,
    )


def _in_json(logprobs: Logprobs) -> Logprobs:
    return {
        token: value if math.isfinite(value) else LOWEST_LOGPROB
        for token, value in logprobs.items()
    }
