"""`stream_infer`: pieces as they come, of one prompt or many; a dropped iterator ends the work."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from tests.visq.pipeline.test_infer import Watched
from tests.waiting import until
from visq.pipeline import GenerationConfig, Pipeline, Response

LONG = GenerationConfig(max_new_tokens=400, ignore_eos=True)


def whole(pieces: list[Response]) -> Response:
    first, *others = pieces
    for other in others:
        first.extend(other)
    return first


def test_the_pieces_make_the_answer(pipe: Pipeline) -> None:
    answer = pipe("Hello!")
    pieces = list(pipe.stream_infer("Hello!"))
    assert len(pieces) > 2
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    lengths = [piece.generate_token_len for piece in pieces]
    assert lengths == sorted(lengths)
    assert lengths[-1] == answer.generate_token_len
    assert whole(pieces) == answer


def test_the_pieces_of_many_prompts_say_whose_they_are(
    pipe: Pipeline, sample: Path, nothing_left: Callable[[], None]
) -> None:
    prompts = ["Hello!", ("How many things are there?", sample), ("what?", Path("/nowhere.png"))]
    pieces = list(pipe.stream_infer(prompts))
    answers = [whole([p for p in pieces if p.index == index]) for index in range(3)]
    assert answers == pipe(prompts)
    assert answers[2].error_code == "image_not_found"


def test_without_streaming_each_prompt_has_one_response(pipe: Pipeline) -> None:
    responses = list(pipe.stream_infer(["Hello!", "Hello!"], stream_response=False))
    assert sorted(response.index for response in responses) == [0, 1]
    assert {response.text for response in responses} == {pipe("Hello!").text}


def test_a_dropped_iterator_ends_the_work(
    pipe: Pipeline, sample: Path, nothing_left: Callable[[], None]
) -> None:
    watched = Watched(pipe.engine)
    stream = Pipeline.over(watched).stream_infer([("what?", sample)] * 6, gen_config=LONG)
    assert len(list(islice(stream, 3))) == 3
    del stream
    nothing_left()
    until(lambda: watched.open == 0, 10, "the requests to end")
    assert len(watched.requests) < 6


def test_an_iterator_that_is_never_started_costs_nothing(pipe: Pipeline, sample: Path) -> None:
    watched = Watched(pipe.engine)
    stream = Pipeline.over(watched).stream_infer([("what?", sample)] * 3)
    del stream
    assert watched.requests == []


def test_a_session_ends_its_own_prompt_and_no_other(pipe: Pipeline) -> None:
    one, two = pipe.session(), pipe.session()
    texts = ["", ""]
    ends: dict[int, str | None] = {}
    for piece in pipe.stream_infer(["Hello!", "Hello!"], [one, two], gen_config=[LONG, None]):
        texts[piece.index] += piece.text
        if piece.finish_reason:
            ends[piece.index] = piece.finish_reason
        elif piece.index == 0:
            one.abort()
    assert ends == {0: "abort", 1: "stop"}
    assert texts[1] == pipe("Hello!").text


def test_sessions_are_one_for_each_prompt_and_used_once_at_a_time(pipe: Pipeline) -> None:
    session = pipe.session()
    with pytest.raises(ValueError, match="1 entries for 2 prompts"):
        pipe.stream_infer(["Hello!", "Hello!"], session)
    responses = list(
        pipe.stream_infer(["Hello!", "Hello!"], [session, session], stream_response=False)
    )
    assert {r.index: r.error_code for r in responses} == {0: None, 1: "request_conflict"}
