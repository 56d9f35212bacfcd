"""One choice of a request: its sequence of tokens, its text, and what constrains both."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.engine.answer import Answer
from worker.engine.bad_words import BadWords
from worker.engine.face import Choice, Logprobs, TokenEvent
from worker.engine.grammar import Grammar
from worker.engine.params import SamplingParams
from worker.engine.repetition import NgramRepetition
from worker.engine.sampler import Processor, SampleRow
from worker.engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class Generation:
    """Takes tokens as they are sampled, and says how the next one is."""

    sequence: Sequence
    params: SamplingParams
    answer: Answer
    repetition: NgramRepetition
    bad_words: BadWords | None = None
    grammar: Grammar | None = None
    processors: ListLike[Processor] = ()
    keep_logits: bool = False
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    """Of each generated token, if they are kept."""
    choice: Choice | None = None
    """The complete answer, once it has ended."""
    plain: bool = field(init=False)
    """Whether each token is the one with the largest logit, and nothing else is asked for."""

    def __post_init__(self) -> None:
        self.plain = self.params.plain and not (self.needs_feedback or self.keep_logits)

    @property
    def generated_ids(self) -> list[int]:
        """Sampled tokens so far, the stop token among them."""
        return self.sequence.token_ids[self.sequence.prompt_tokens :]

    @property
    def needs_feedback(self) -> bool:
        """Whether the next token depends on the text of the ones before it."""
        return bool(self.bad_words or self.grammar or self.processors)

    def row(self) -> SampleRow:
        """How the next token is sampled."""
        sequence = self.sequence
        return SampleRow(
            slot=sequence.slot,
            step=sequence.generated,
            banned=self.bad_words.banned(self.answer.tail) if self.bad_words else (),
            bitmask=self.grammar.bitmask() if self.grammar else None,
            processors=self.processors,
            token_ids=sequence.token_ids if self.processors else (),
        )

    def take(
        self,
        token: int,
        logprobs: Logprobs | None,
        logits: NDArray[np.float32] | None,
        *,
        hold: int = 1,
    ) -> TokenEvent | None:
        """Add the sampled token; afterwards `stopped` says whether it was the last one.

        :param hold: see `Answer.append`.
        """
        sequence = self.sequence
        sequence.pending -= 1
        sequence.token_ids.append(token)
        event = self.answer.append(token, logprobs, hold=hold)
        if logits is not None and len(self.logits) < len(self.answer.token_ids):
            self.logits.append(logits)
        if self.grammar is not None:
            self.grammar.accept(token)
            self.answer.stopped = self.answer.stopped or self.grammar.finished
        if self.repetition.append(token):
            self.answer.stopped = True
        return event

    @property
    def stopped(self) -> bool:
        sequence = self.sequence
        return self.answer.stopped or len(sequence.token_ids) >= sequence.max_tokens

    def finish(self, prompt_logits: NDArray[np.float32] | None) -> TokenEvent | None:
        """End the answer; returns what was held back of its text."""
        event, choice = self.answer.finish()
        if self.keep_logits:
            parts: list[Any] = [] if prompt_logits is None else [prompt_logits]
            if self.logits:
                parts.append(np.stack(self.logits))
            logits = np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
            choice = replace(choice, logits=logits)
        self.choice = choice
        return event
