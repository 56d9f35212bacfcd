"""The commands that run visq, as far as they need no servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from visq.cli.show_settings import hide_password
from visq.settings import Settings


def visq(
    *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VISQ_")}
    clean["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "visq", *arguments],
        cwd=cwd,
        env={**clean, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def test_config_shows_every_setting_with_its_meaning(tmp_path: Path) -> None:
    done = visq("config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, field in Settings.model_fields.items():
        assert f"VISQ_{name.upper()} = " in done.stdout
        assert (field.description or "").split("\n")[0] in done.stdout


def test_config_hides_every_secret(tmp_path: Path) -> None:
    secrets = {
        "VISQ_DATABASE_URL": "postgresql+psycopg://user:hunter2@db/visq?sslpassword=hunter2",
        "VISQ_BROKER_URL": "amqp://user:hunter2@mq//",
        "VISQ_REDIS_URL": "redis://:hunter2@cache/0",
        "VISQ_API_KEYS": "alice:hunter2,bob:hunter2bob",
        "VISQ_S3_ACCESS_KEY_ID": "hunter2",
        "VISQ_S3_SECRET_ACCESS_KEY": "hunter2",
    }
    for arguments in (["config"], ["config", "--json"]):
        done = visq(*arguments, cwd=tmp_path, environment=secrets)
        assert done.returncode == 0, done.stderr
        assert "hunter2" not in done.stdout + done.stderr
        assert "alice:********,bob:********" in done.stdout


def test_config_as_json_has_the_values_in_effect(tmp_path: Path) -> None:
    done = visq("config", "--json", cwd=tmp_path, environment={"VISQ_PORT": "1234"})
    values = json.loads(done.stdout)
    assert values["VISQ_PORT"] == "1234"
    assert values["VISQ_DATABASE_URL"] == f"sqlite:///{tmp_path}/visq-data/visq.db"
    assert values["VISQ_OBJECT_STORE"] == f"file://{tmp_path}/visq-data/objects"


def test_a_wrong_setting_is_one_line_that_names_the_variable_and_not_its_value(
    tmp_path: Path,
) -> None:
    done = visq("config", cwd=tmp_path, environment={"VISQ_PORT": "hunter2"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert "VISQ_PORT" in done.stderr
    assert "hunter2" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:pass/with@odd@host/0", "redis://:********@host/0"),
        ("amqp://me:p@host//", "amqp://me:********@host//"),
        ("rediss://host/0?password=p&db=1", "rediss://host/0?password=********&db=1"),
    ],
)
def test_only_the_password_of_a_url_is_hidden(url: str, shown: str) -> None:
    assert hide_password(url) == shown


def test_migrate_makes_the_tables_and_says_the_revision(tmp_path: Path) -> None:
    done = visq("migrate", cwd=tmp_path, environment={"VISQ_DATA": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "database at revision" in done.stdout
    assert (tmp_path / "visq.db").stat().st_size > 0


def test_migrate_of_a_database_that_does_not_answer_is_an_error_and_not_a_traceback(
    tmp_path: Path,
) -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=2"
    done = visq("migrate", cwd=tmp_path, environment={"VISQ_DATABASE_URL": url})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error" in done.stderr
