"""The parts of `visq demo` that its end-to-end test does not see."""

from __future__ import annotations

import pytest
from kombu import Connection

from tests.visq.result_events import ended_job, event_of, publisher
from visq.cli import demo
from visq.cli.demo import BATCH_SIZE, Report, Shown, load_samples
from visq.cli.demo_consumer import ConsumerProcess
from visq.errors import Unavailable


def test_the_consumer_process_counts_results_and_leaves_no_queue(broker_url: str) -> None:
    lines: list[str] = []
    with (
        ConsumerProcess(broker_url, "demo-queue", "acme.#", lines.append) as consumer,
        publisher(broker_url) as broker,
    ):
        broker.publish_result(event_of(ended_job("Three.")))
        assert consumer.wait_for(1, 30) == 0
        assert consumer.wait_for(3, 0) == 2
    assert "Three." in lines[0]

    with Connection(broker_url) as connection:
        channel = connection.default_channel
        with pytest.raises(connection.channel_errors):
            channel.queue_declare("demo-queue", passive=True)


def test_a_consumer_process_that_cannot_start_is_an_error() -> None:
    with (
        pytest.raises(Unavailable, match="did not reach the broker"),
        ConsumerProcess("no-such-transport://", "queue", "acme.#", print),
    ):
        pass


def test_the_samples_are_enough_for_the_flow() -> None:
    samples = load_samples()
    assert len(samples) > BATCH_SIZE
    assert any(sample.follow_up for sample in samples)
    assert all((demo.samples_folder() / sample.file).is_file() for sample in samples)


def test_the_flow_worked_if_all_results_came_and_most_answers_are_right() -> None:
    right = Shown("job_1", "a.png", "?", " Red.", "red")
    wrong = Shown("job_2", "b.png", "?", "blue", "red")
    assert right.is_right
    assert not wrong.is_right
    assert Report([right] * 4 + [wrong], {}, missing=0, missing_values=0).worked
    assert not Report([right] * 3 + [wrong], {}, missing=0, missing_values=0).worked
    assert not Report([right], {}, missing=1, missing_values=0).worked
    assert not Report([right], {}, missing=0, missing_values=1).worked
