"""The README is true: its commands and programs are run here, as they stand there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import until
from visq.embedded.connection import ConnectionInfo
from visq.embedded.processes import end, free_port, start_tethered

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.timeout(240)


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", README, re.M | re.S)
    assert found, f"the README has no section {title!r}"
    return found.group(1)


def block(title: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", section(title), re.M | re.S)
    assert found, f"the section {title!r} has no {language} block"
    return found.group(1)


class Reader:
    """Somebody who follows the README in a folder with the checkout's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = str(free_port())
        (folder / "worker").symlink_to(ROOT / "worker")
        own = {name: value for name, value in os.environ.items() if not name.startswith("VISQ_")}
        self.environment = own | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VISQ_PORT": self.port,
            "VISQ_ENGINE_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        return start_tethered(command, log=self.folder / log, env=self.environment, cwd=self.folder)

    def bash(self, script: str) -> str:
        return self.run(["bash", "-euo", "pipefail", "-c", script.replace("8710", self.port)])

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """With ``visq up`` running, as the section "Start it" says."""
    reader = Reader(tmp_path_factory.mktemp("reader"))
    command = block("Start it", "bash").strip()
    process = reader.start(["bash", "-c", f"exec {command}"], "up.log")

    def running() -> bool:
        assert process.poll() is None, (reader.folder / "up.log").read_text()
        return ConnectionInfo.read(reader.folder / "visq-data") is not None

    until(running, 120, "visq up")
    yield reader
    assert end(process, 60, signal.SIGINT), "visq up must end at Ctrl-C"


def test_the_rest_example_answers(reader: Reader) -> None:
    answer = reader.bash(block("REST", "bash"))
    assert '"status":"succeeded"' in answer.replace(" ", "")


def test_the_python_example_prints_two_answers(reader: Reader) -> None:
    lines = reader.run([sys.executable, "-c", block("Python", "python")]).splitlines()
    assert lines == ["9", "yes"]


def test_the_command_line_example_shows_the_job_it_submitted(reader: Reader) -> None:
    assert "job_" in reader.bash(block("Command line", "bash"))


def test_the_consumer_example_receives_results(reader: Reader) -> None:
    program = reader.folder / "consumer.py"
    program.write_text(block("Consumer", "python"))
    process = reader.start([sys.executable, str(program)], "consumer.log")
    try:

        def received() -> bool:
            reader.bash('visq submit "hello" --no-wait --data visq-data')
            return "visq.job.succeeded job_" in (reader.folder / "consumer.log").read_text()

        until(received, 60, "a result at the consumer", every=1.0)
    finally:
        end(process, 10)


def test_the_library_example_prints_two_answers(reader: Reader) -> None:
    lines = reader.run([sys.executable, "-c", block("As a library", "python")]).splitlines()
    assert lines == ["A gray star, a brown star, a purple triangle.", "center"]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^make (\w+)", block("Two commands", "console"), re.M)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_every_link_leads_to_a_file_of_the_repository() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_settings_that_the_readme_names_exist() -> None:
    from visq.settings import Settings

    known = {f"VISQ_{name.upper()}" for name in Settings.model_fields}
    for name in re.findall(r"`(VISQ_[A-Z0-9_]+)`", README):
        assert name in known
