"""What waits for the pipe merges, and nothing of it is lost or out of order."""

from __future__ import annotations

import threading
from collections import defaultdict

from worker.engine.face import Choice, Finished, Stopped, TokenEvent
from worker.engine.postbox import Postbox, merged
from worker.engine.wire import Happened, PixelsNeeded

END = Finished((Choice("a cat", "stop", [1, 2]),), 3)


def only(messages: list[object]) -> Happened:
    [message] = messages
    assert isinstance(message, Happened)
    return message


def test_what_comes_when_nothing_was_sent_goes_by_itself() -> None:
    postbox = Postbox()
    postbox.happened(1, TokenEvent("a", [5]))
    assert only([*postbox.take()]) == Happened([(1, "a", [5], 0, None)], [])


def test_token_events_of_a_choice_that_wait_become_one() -> None:
    postbox = Postbox()
    for text, token in (("a", 5), (" c", 6), ("", 7), ("at", 8)):
        postbox.happened(1, TokenEvent(text, [token]))
    assert only([*postbox.take()]).said == [(1, "a cat", [5, 6, 7, 8], 0, None)]


def test_requests_and_choices_stay_apart() -> None:
    events = [
        (1, TokenEvent("a", [1], 0)),
        (2, TokenEvent("b", [2], 0)),
        (1, TokenEvent("c", [3], 1)),
        (1, TokenEvent("d", [4], 0)),
        (2, TokenEvent("e", [5], 0)),
    ]
    assert merged(events) == [
        (1, "ad", [1, 4], 0, None),
        (2, "be", [2, 5], 0, None),
        (1, "c", [3], 1, None),
    ]


def test_there_is_one_entry_of_logprobs_for_each_token() -> None:
    events = [
        (1, TokenEvent("a", [1], logprobs=[{1: -0.5}])),
        (1, TokenEvent("", [])),  # text that was held back
        (1, TokenEvent("bc", [2, 3], logprobs=[{2: -1.0}, {3: -2.0}])),
    ]
    assert merged(events) == [(1, "abc", [1, 2, 3], 0, [{1: -0.5}, {2: -1.0}, {3: -2.0}])]


def test_an_outcome_goes_with_the_tokens_before_it_and_does_not_wait() -> None:
    postbox = Postbox()
    postbox.happened(1, TokenEvent("", [0]))
    postbox.take()  # so that tokens would have to wait now
    postbox._earliest += 3600
    postbox.happened(1, TokenEvent("a cat", [1, 2]))
    postbox.happened(2, Stopped("cancelled"))
    postbox.happened(1, END)
    assert only([*postbox.take()]) == Happened(
        [(1, "a cat", [1, 2], 0, None)], [(2, Stopped("cancelled")), (1, END)]
    )


def test_a_question_for_pixels_does_not_wait_behind_tokens() -> None:
    postbox = Postbox()
    postbox.happened(1, TokenEvent("", [0]))
    postbox.take()
    postbox._earliest += 3600
    postbox.put(PixelsNeeded(2, 0))
    assert postbox.take() == [PixelsNeeded(2, 0)]


def test_nothing_is_lost_or_out_of_order_while_many_speak() -> None:
    postbox = Postbox()
    words = [f"{n} " for n in range(2000)]

    def speak(number: int) -> None:
        for token, word in enumerate(words):
            postbox.happened(number, TokenEvent(word, [token]))
        postbox.happened(number, END)

    speakers = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for speaker in speakers:
        speaker.start()
    texts: dict[int, str] = defaultdict(str)
    tokens: dict[int, list[int]] = defaultdict(list)
    ended: list[int] = []
    while len(ended) < len(speakers):
        for message in postbox.take():
            assert isinstance(message, Happened)
            for number, text, token_ids, _, _ in message.said:
                assert number not in ended
                texts[number] += text
                tokens[number] += token_ids
            ended += [number for number, _ in message.ended]
    assert set(texts.values()) == {"".join(words)}
    assert all(each == list(range(len(words))) for each in tokens.values())
