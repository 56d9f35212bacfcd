"""An engine's events as `Response`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from visq.pipeline.response import Response
from worker.engine.face import Choice, Event, Failed, Finished, Outcome, TokenEvent

if TYPE_CHECKING:
    import torch


class Collector:
    """Makes pieces of events, and knows what an answer that was cut off had so far."""

    def __init__(self) -> None:
        self._so_far: dict[tuple[int, int], Response] = {}
        """By the index of the prompt and of the choice."""

    def pieces(self, index: int, event: Event) -> list[Response]:
        """The pieces to show for an event of the prompt `index`."""
        if isinstance(event, TokenEvent):
            return [self._piece(index, event)]
        if isinstance(event, Finished):
            return list(_last_pieces(index, event))
        return [self._end(index, event)]

    def whole(self, index: int, outcome: Outcome) -> Response:
        """The answer to the prompt `index`; of a cancelled one, what it had."""
        end = whole(outcome, index)
        said = self._so_far.get((index, 0))
        if isinstance(outcome, Finished | Failed) or said is None:
            return end
        end.text, end.token_ids, end.logprobs = said.text, said.token_ids, said.logprobs
        end.generate_token_len = len(said.token_ids)
        return end

    def _piece(self, index: int, event: TokenEvent) -> Response:
        key = (index, event.index)
        piece = Response(
            text=event.text,
            generate_token_len=len(event.token_ids),
            input_token_len=0,
            token_ids=list(event.token_ids),
            logprobs=event.logprobs,
            index=index,
            choice=event.index,
        )
        said = self._so_far.get(key)
        if said is None:
            said = self._so_far[key] = Response("", 0, 0, index=index, choice=event.index)
        piece.generate_token_len += said.generate_token_len
        said.extend(piece)
        return piece

    def _end(self, index: int, outcome: Outcome) -> Response:
        end = whole(outcome, index)
        said = self._so_far.get((index, 0))
        end.generate_token_len = said.generate_token_len if said else 0
        return end


def whole(outcome: Outcome, index: int) -> Response:
    """All of the answer to the prompt `index`."""
    if isinstance(outcome, Failed):
        return Response.of_error(outcome.error, index)
    if not isinstance(outcome, Finished):
        return Response("", 0, 0, finish_reason="abort", index=index)
    found = [_of_choice(outcome, choice, index, n) for n, choice in enumerate(outcome.choices)]
    first = found[0]
    first.choices = found if len(found) > 1 else []
    return first


def _of_choice(outcome: Finished, choice: Choice, index: int, number: int) -> Response:
    return Response(
        text=choice.text,
        generate_token_len=len(choice.token_ids),
        input_token_len=outcome.prompt_tokens,
        finish_reason=choice.finish_reason,
        token_ids=choice.token_ids,
        logprobs=choice.logprobs,
        logits=_tensor(choice.logits),
        index=index,
        cached_tokens=outcome.cached_tokens,
        choice=number,
        ppl=outcome.ppl,
    )


def _last_pieces(index: int, outcome: Finished) -> Iterator[Response]:
    """For each choice: how it ended, and nothing that was shown before."""
    for number, choice in enumerate(outcome.choices):
        piece = _of_choice(outcome, choice, index, number)
        piece.text, piece.token_ids, piece.logprobs = "", [], None
        yield piece


def _tensor(logits: Any) -> torch.Tensor | None:
    if logits is None:
        return None
    import torch

    return torch.from_numpy(logits)
