"""`Pipeline.chat`: conversations that are appended to only by what succeeded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.visq.pipeline.conftest import TRUTH
from tests.visq.pipeline.test_infer import Watched
from visq.pipeline import ChatTemplateConfig, GenerationConfig, Pipeline, RequestConflict, Session
from visq.vl import load_image

TALK = TRUTH["01-shapes.png"]
LONG = GenerationConfig(max_new_tokens=1500, ignore_eos=True)


@pytest.fixture
def watched(pipe: Pipeline) -> Watched:
    return Watched(pipe.engine)


def test_the_next_turn_sees_the_history_and_the_exact_tokens_of_the_answers(
    watched: Watched, sample: Path, nothing_left: Callable[[], None]
) -> None:
    pipe = Pipeline.over(watched)
    session = pipe.chat((TALK["question"], load_image(sample)))
    assert isinstance(session, Session)
    assert session.response is not None
    first = session.response
    assert first.text == TALK["answer"]
    again = pipe.chat(TALK["follow_up"]["question"], session=session)
    assert again is session
    assert session.response.text == TALK["follow_up"]["answer"]
    assert len(session.history) == 2

    one, two = watched.requests
    assert one.answer_ids == {}
    assert two.answer_ids == {1: first.token_ids}
    assert [message.role for message in two.messages] == ["user", "assistant", "user"]
    assert len(two.images) == 1
    assert two.images[0].sha256 == one.images[0].sha256


def test_an_answer_that_the_program_changed_is_sent_as_text(watched: Watched) -> None:
    pipe = Pipeline.over(watched)
    session = pipe.chat("Hello!")
    session.history[0] = ("Hello!", "Good day.")
    pipe.chat("Hello!", session=session)
    assert watched.requests[1].answer_ids == {}
    assert watched.requests[1].messages[1].content == "Good day."


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(stop_words=["e"]),
        GenerationConfig(stop_words=["e"], include_stop_str_in_output=True),
        GenerationConfig(include_stop_str_in_output=True),
    ],
)
def test_an_answer_whose_tokens_may_run_on_beyond_its_text_is_sent_as_text(
    watched: Watched, config: GenerationConfig
) -> None:
    pipe = Pipeline.over(watched)
    session = pipe.chat("Hello!", gen_config=config)
    assert session.response.finish_reason == "stop"
    assert session.response.token_ids != []
    pipe.chat("Hello!", session=session)
    assert watched.requests[1].answer_ids == {}


def test_the_stop_words_of_a_template_count_as_well(watched: Watched) -> None:
    pipe = Pipeline.over(watched, ChatTemplateConfig("internvl2_5", stop_words=["e"]))
    session = pipe.chat("Hello!")
    assert session.response.finish_reason == "stop"
    pipe.chat("Hello!", session=session)
    assert watched.requests[1].answer_ids == {}


def test_a_history_may_hold_any_form_of_a_prompt(watched: Watched) -> None:
    pipe = Pipeline.over(watched)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    session = pipe.chat(messages)
    pipe.chat("Hello!", session=session)
    roles = [message.role for message in watched.requests[1].messages]
    assert roles == ["system", "user", "assistant", "user"]
    assert list(watched.requests[1].answer_ids) == [2]


def test_the_history_shows_the_picture_that_was_shown(watched: Watched, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    pipe = Pipeline.over(watched)
    session = pipe.chat(("what?", picture))
    Image.new("RGB", (8, 8), "blue").save(picture)
    pipe.chat("and now?", session=session)
    one, two = watched.requests
    assert one.images[0].sha256 == two.images[0].sha256


def test_a_turn_in_pieces_is_appended_when_it_has_ended(pipe: Pipeline) -> None:
    session = pipe.session()
    text = ""
    for piece in pipe.chat("Hello!", session=session, stream_response=True):
        assert piece.finish_reason is not None or session.history == []
        text += piece.text
    assert session.history == [("Hello!", text)]
    assert session.response is not None
    assert (session.response.text, session.response.finish_reason) == (text, "stop")


def test_a_turn_that_fails_says_so_and_is_not_appended(pipe: Pipeline) -> None:
    session = pipe.chat("Hello!")
    before = list(session.history)
    pipe.chat(("what?", Path("/nowhere.png")), session=session)
    assert session.history == before
    assert session.response is not None
    assert session.response.error_code == "image_not_found"
    pipe.chat("Hello!", session=session)
    assert len(session.history) == 2


def test_a_dropped_turn_is_not_appended_and_frees_the_session(
    pipe: Pipeline, sample: Path, nothing_left: Callable[[], None]
) -> None:
    session = pipe.session()
    stream = pipe.chat(("what?", sample), session, LONG, stream_response=True)
    next(stream)
    with pytest.raises(RequestConflict, match="has not ended"):
        pipe.chat("Hello!", session=session)
    stream.close()
    nothing_left()
    assert session.history == []
    assert session.response is None
    assert pipe.chat("Hello!", session=session).history[0][0] == "Hello!"


def test_an_aborted_turn_keeps_what_it_had_and_is_not_appended(pipe: Pipeline) -> None:
    session = pipe.session()
    text = ""
    for piece in pipe.chat("Hello!", session, LONG, stream_response=True):
        text += piece.text
        session.abort()
    assert session.history == []
    assert session.response is not None
    assert session.response.finish_reason == "abort"
    assert session.response.text == text != ""
    assert session.response.generate_token_len == len(session.response.token_ids) > 0


def test_two_turns_at_once_are_a_conflict_also_from_two_threads(pipe: Pipeline) -> None:
    session = pipe.session()
    outcomes: list[str] = []
    start = threading.Barrier(2)

    def turn() -> None:
        start.wait()
        try:
            pipe.chat("Hello!", session, GenerationConfig(max_new_tokens=200, ignore_eos=True))
            outcomes.append("answered")
        except RequestConflict as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=turn) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["answered", "request_conflict"]
    assert len(session.history) == 1


def test_a_closed_session_is_empty_and_what_still_runs_does_not_return_to_it(
    pipe: Pipeline,
) -> None:
    session = pipe.session()
    stream = pipe.chat("Hello!", session, LONG, stream_response=True)
    next(stream)
    session.close()
    list(stream)
    assert (session.history, session.response, session.prompt) == ([], None, None)
    assert pipe.chat("Hello!", session=session).history


def test_the_sessions_own_config_is_for_turns_that_give_none(pipe: Pipeline) -> None:
    session = pipe.session()
    session.update(gen_config=GenerationConfig(max_new_tokens=1))
    pipe.chat("Hello!", session=session)
    assert session.response is not None
    assert session.response.generate_token_len == 1
    pipe.chat("Hello!", session=session, gen_config=GenerationConfig(max_new_tokens=2))
    assert session.response.generate_token_len == 2


def test_a_chat_takes_one_prompt(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="one prompt"):
        pipe.chat(["Hello!", "Hello!"])


def test_a_session_says_what_was_said(pipe: Pipeline) -> None:
    session = pipe.chat("Hello!")
    assert "USER:\nHello!\nASSISTANT:\n" in str(session)
    assert repr(session) == f"Session(session_id={session.session_id}, history_len=1)"
