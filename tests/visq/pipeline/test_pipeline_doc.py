"""docs/pipeline.md is true: its examples run as they stand there, and its table names what is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.visq.pipeline.conftest import SAMPLES
from visq.embedded.stack import Stack
from visq.pipeline.mapping import ACCEPTED, OURS

DOCUMENT = (Path(__file__).parents[3] / "docs/pipeline.md").read_text()


def examples(mark: str) -> list[str]:
    return re.findall(rf"<!-- {mark} -->\n```python\n(.*?)^```", DOCUMENT, re.M | re.S)


LOCAL = examples("example")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(SAMPLES / "02-shapes.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)


def run(program: str, capsys: pytest.CaptureFixture[str]) -> str:
    exec(compile(program, "docs/pipeline.md", "exec"), {"__name__": "__main__"})
    return capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(LOCAL) == 4
    assert len(examples("example: remote")) == 1
    assert len(re.findall("```python", DOCUMENT)) == 5


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, ["A gray star, a brown star, a purple triangle.\n"]),
        (1, ["\n3\n", "no such file.png is not a file"]),
        (2, ["0 'I' None", "1 '' stop", "\n3\nyes\n", "ASSISTANT:"]),
        (3, ["I don't know.\n"]),
    ],
)
def test_the_example_runs(
    number: int, said: list[str], folder: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(LOCAL[number], capsys)
    assert output.strip()
    for each in said:
        assert each in output


def test_the_remote_example_runs(
    stack: Stack,
    folder: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VISQ_URL", stack.url)
    monkeypatch.setenv("VISQ_API_KEY", stack.api_key)
    [program] = examples("example: remote")
    assert run(program, capsys).endswith("['3', 'yes']\n")


def test_the_table_of_fields_names_those_of_the_code() -> None:
    [table] = re.findall(r"leaves ours at our default.*?\n\n(.*?)\n\n", DOCUMENT, re.S)
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    named = [set(re.findall(r"`(\w+)`", theirs)) for theirs, _ in rows]
    *ours, accepted, refused = named
    assert set().union(*ours) == set(OURS)
    assert accepted <= ACCEPTED
    assert not refused & (set(OURS) | ACCEPTED)
