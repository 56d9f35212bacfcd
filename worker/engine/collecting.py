"""What a step has computed becomes answers: tokens, events, likelihoods, outcomes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from worker.engine.face import Finished, Logprobs
from worker.engine.generation import Generation
from worker.engine.intake import Running
from worker.engine.sequence import Sequence
from worker.engine.stats import Counters

PPL_ROWS: Final = 256
"""Tokens of a prompt whose likelihoods are computed at a time; bounds the memory for it."""


class Collector:
    """Adds to the answers of running requests, and publishes their text as it comes."""

    def __init__(self, counters: Counters, add: Callable[[Sequence], None]) -> None:
        """:param add: takes the further choices of a request when its prompt is in the cache."""
        self._counters = counters
        self._add = add

    def take(
        self,
        running: Running,
        generation: Generation,
        token: int,
        logprobs: Logprobs | None,
        logits: NDArray[np.float32] | None,
        *,
        hold: int = 1,
    ) -> None:
        """Add a sampled token to an answer; its sequence has `ended` if it was the last one.

        :param logits: ``(vocabulary,)``, raw, if they are kept.
        :param hold: see `Answer.append`.
        """
        self._counters.generated_tokens += 1
        if running.first_token_at is None:
            now = running.first_token_at = time.monotonic()
            self._counters.first_token.observe(now - running.task.submitted)
            for other in running.generations[1:]:
                # The prompt is in the cache: there the other choices find it.
                self._add(other.sequence)
        generation.sequence.wants_prompt_logits = False  # they are all there
        event = generation.take(token, logprobs, logits, hold=hold)
        if event is not None:
            running.task.handle.publish(event)
        if generation.stopped:
            _complete(running, generation)

    def finish(self, running: Running) -> Finished:
        """The outcome of a request whose choices are all complete."""
        choices = [generation.choice for generation in running.generations]
        ppl = None
        if running.task.request.gen_config.return_ppl and running.nll:
            ppl = sum(running.nll.values()) / len(running.nll)
        outcome = Finished(
            tuple(choice for choice in choices if choice is not None),
            running.prompt_tokens,
            running.first.cached_tokens,
            ppl,
        )
        self._counters.finished += 1
        after_first = max(len(choice.token_ids) for choice in outcome.choices) - 1
        if running.first_token_at is not None and after_first > 0:
            took = time.monotonic() - running.first_token_at
            self._counters.per_token.observe(took / after_first)
        return outcome


def keep_prompt_logits(
    running: Running, sequence: Sequence, start: int, logits: torch.Tensor
) -> None:
    """Keep what a request asked for of the prompt's logits.

    :param start: index of the first token of a chunk.
    :param logits: ``(tokens, vocabulary)`` float32, after each token of the chunk.
    """
    config = running.task.request.gen_config
    if config.output_logits == "all":
        if start == 0:
            # After a preemption the prompt comes once more, perhaps in other chunks.
            running.prompt_logits.clear()
        running.prompt_logits[start] = logits.cpu().numpy()
    if config.return_ppl:
        targets = sequence.token_ids[start + 1 : sequence.prompt_tokens][: len(logits)]
        for first in range(0, len(targets), PPL_ROWS):  # each part is copied by log_softmax
            part = torch.tensor(targets[first : first + PPL_ROWS], device=logits.device)
            losses = cross_entropy(logits[first : first + len(part)], part, reduction="none")
            running.nll.update(enumerate(losses.tolist(), start + first))


def _complete(running: Running, generation: Generation) -> None:
    prompt_logits = None
    if running.prompt_logits:
        prompt_logits = np.concatenate(
            [running.prompt_logits[start] for start in sorted(running.prompt_logits)]
        )
    event = generation.finish(prompt_logits)
    if event is not None:
        running.task.handle.publish(event)
    # Its blocks are given back after the scheduler has made them known by their content.
    generation.sequence.ended = True
