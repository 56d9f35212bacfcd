"""docs/consumers.md is true: its consumer in plain kombu, without visq, receives results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.visq.result_events import ended_job, event_of, publisher
from tests.waiting import until
from visq.types import JobKind, JobStatus

SOON = 30.0
DOC = (Path(__file__).parents[2] / "docs" / "consumers.md").read_text()


def block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```python\n(.*?)^```", DOC, re.M | re.S)
    assert found, f"docs/consumers.md has no block {marker!r}"
    return found.group(1)


@contextmanager
def running(program: Path, broker_url: str, log: Path) -> Iterator[None]:
    """Run it in a folder of its own; entered when it consumes."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(program)],
            env={"BROKER_URL": broker_url, "PATH": os.environ["PATH"]},
            cwd=program.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: "consuming" in log.read_text(), SOON, f"{log} to say so")
        yield
    finally:
        process.kill()
        process.wait()


def test_the_consumer_in_plain_kombu_receives_results(broker_url: str, tmp_path: Path) -> None:
    program, log = tmp_path / "consumer.py", tmp_path / "consumer.log"
    program.write_text(block("plain-kombu"))
    assert "import visq" not in program.read_text()
    succeeded = event_of(ended_job("Three."))
    failed = event_of(ended_job(kind=JobKind.GENERATE, status=JobStatus.FAILED))
    with running(program, broker_url, log), publisher(broker_url) as broker:
        broker.publish_result(event_of(ended_job("not ours"), tenant="other"))
        broker.publish_result(succeeded)
        broker.publish_result(failed)
        until(lambda: failed["id"] in log.read_text(), SOON, "both results")
    said = log.read_text()
    assert f"{succeeded['id']} {succeeded['subject']} succeeded Three." in said
    assert "not ours" not in said


def test_it_goes_on_with_what_came_while_it_was_away(broker_url: str, tmp_path: Path) -> None:
    program, log = tmp_path / "consumer.py", tmp_path / "consumer.log"
    program.write_text(block("plain-kombu"))
    with running(program, broker_url, log):
        pass  # makes the queue
    event = event_of(ended_job("Meanwhile."))
    with publisher(broker_url) as broker:
        broker.publish_result(event)
    with running(program, broker_url, log):
        until(lambda: event["id"] in log.read_text(), SOON, "the result")
