"""Batches that are followed by a client, through the whole of visq with the small model: processes
are killed and interrupted on the way, and nothing is missing and nothing comes twice."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.deployment import API_KEY, Deployment
from tests.servers import Valkey
from tests.waiting import until
from visq import Client
from visq.types import BatchStatus, JobStatus

pytestmark = pytest.mark.timeout(240)

SHORT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, valkey: Valkey) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("visq")
    settings = {"redis_url": valkey.url, "broker_url": valkey.url}
    with Deployment(folder, settings) as deployment:
        deployment.start_worker()
        yield deployment


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with deployment.client() as client:
        yield client


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number, colour in enumerate(("red", "blue", "green")):
        buffer = io.BytesIO()
        Image.new("RGB", (90, 60), colour).save(buffer, "PNG")
        (tmp_path / f"{number}.png").write_bytes(buffer.getvalue())
    return tmp_path


def items(count: int) -> list[dict[str, Any]]:
    return [
        {"custom_id": f"i{n}", "prompt": "what color is it?", "images": [f"{n % 3}.png"]}
        for n in range(count)
    ]


def hear_ctrl_c() -> None:
    """In a new process: tests that run in the background of a shell ignore the signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """``visq batch run`` as a process."""

    def __init__(self, deployment: Deployment, folder: Path, *arguments: str) -> None:
        environment = {**deployment.environment, "VISQ_URL": deployment.url}
        environment |= {"VISQ_API_KEY": API_KEY}
        self._log = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "visq", "batch", "run", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            preexec_fn=hear_ctrl_c,
        )

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def ended(self) -> tuple[int, str]:
        """Its status, and what it said."""
        status = self.process.wait(120)
        self._log.seek(0)
        return status, self._log.read()


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def test_a_run_yields_every_item(client: Client, pictures: Path) -> None:
    asked = [(item["prompt"], pictures / item["images"][0]) for item in items(30)]
    run = client.batches.run(asked, gen_config=SHORT)
    given = list(run)
    assert {job.status for job in given} == {JobStatus.SUCCEEDED}
    assert sorted(int(job.custom_id or "") for job in given) == list(range(30))
    assert run.id is not None
    assert client.batches.get(run.id).view.status is BatchStatus.COMPLETED


def test_an_api_that_is_killed_while_a_run_iterates_loses_and_repeats_nothing(
    client: Client, deployment: Deployment, pictures: Path
) -> None:
    asked = [(item["prompt"], pictures / item["images"][0]) for item in items(60)]
    run = client.batches.run(asked, gen_config=SHORT)
    given = [next(run).custom_id]
    for _ in range(2):
        assert deployment.api is not None
        deployment.api.kill()
        deployment.api.wait()
        deployment.start_api()
        given += [next(run).custom_id for _ in range(10)]
    given += [job.custom_id for job in run]
    assert len(given) == 60
    assert len(set(given)) == 60


def test_ctrl_c_leaves_the_batch_running_and_it_is_gone_on_with(
    client: Client, deployment: Deployment, pictures: Path
) -> None:
    file = pictures / "in.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items(80)))
    output = pictures / "out.jsonl"
    options = ["--images", ".", "--max-new-tokens", "4", "-o", "out.jsonl"]
    first = Command(deployment, pictures, "in.jsonl", *options)
    until(lambda: lines(output), 60, "the first results")
    first.interrupt()
    status, said = first.ended()
    assert status == 130, said
    found = re.search(r"visq batch run --resume (bat_\w+) -o out.jsonl", said)
    assert found is not None, said
    before = len(lines(output))
    assert before < 80, "it was interrupted too late to say anything"
    assert not client.batches.get(found[1]).view.cancelling_at
    status, said = Command(deployment, pictures, "--resume", found[1], "-o", "out.jsonl").ended()
    assert status == 0, said
    assert [line["custom_id"] for line in lines(output)] == [f"i{n}" for n in range(80)]


def test_ctrl_c_cancels_if_it_was_asked_to(
    client: Client, deployment: Deployment, pictures: Path
) -> None:
    (pictures / "in.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items(200)))
    options = ["--images", ".", "-o", "out.jsonl", "--cancel-on-interrupt"]
    command = Command(deployment, pictures, "in.jsonl", *options)
    until(lambda: lines(pictures / "out.jsonl"), 60, "the first results")
    command.interrupt()
    status, said = command.ended()
    assert status == 3, said
    written = lines(pictures / "out.jsonl")
    assert [line["position"] for line in written] == list(range(200)), "each once, in order"
    assert {line["status"] for line in written} == {"succeeded", "cancelled"}
    newest = next(client.batches.list())
    assert newest.status is BatchStatus.CANCELLED


FOLLOW = """
import sys, visq
with visq.Client() as client:
    items = [{"prompt": "what color is it?", "gen_config": {"max_new_tokens": 4}}] * 400
    for job in client.batches.run(items):
        print(job.batch_id, flush=True)
"""


def test_ctrl_c_in_a_program_cancels_its_run(client: Client, deployment: Deployment) -> None:
    environment = {**deployment.environment, "VISQ_URL": deployment.url, "VISQ_API_KEY": API_KEY}
    program = subprocess.Popen(
        [sys.executable, "-c", FOLLOW],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    assert program.stdout is not None
    batch_id = program.stdout.readline().strip()
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=60)
    assert "KeyboardInterrupt" in said
    ended = client.batches.get(batch_id).wait(timeout=60)
    assert ended.status is BatchStatus.CANCELLED
    assert ended.counts.cancelled > 0
