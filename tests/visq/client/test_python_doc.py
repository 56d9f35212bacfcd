"""docs/python.md is true: each of its examples runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.api.running import RunningApi

ROOT = Path(__file__).parents[3]
EXAMPLES = re.findall(
    r"<!-- example -->\n```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.M | re.S
)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 6


@pytest.mark.parametrize("number", range(6))
def test_the_example_runs(
    number: int, api: RunningApi, secret: str, answering: None, tmp_path: Path
) -> None:
    Image.new("RGB", (2, 2), "red").save(tmp_path / "photo.png")
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[number]],
        cwd=tmp_path,
        env={"VISQ_URL": api.url, "VISQ_API_KEY": secret, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "You asked: " in done.stdout or "assistant" in done.stdout
