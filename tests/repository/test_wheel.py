"""What `pip install visq` puts on a machine (docs/decisions/001-packaging.md)."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER_LIBRARIES = ["alembic", "boto3", "celery", "fastapi", "numpy", "sqlalchemy", "torch"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing of ours but what is in the wheel."""
    folder = tmp_path_factory.mktemp("site-packages")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-index", "--target", str(folder), str(wheel)),
        ],
        check=True,
    )
    return folder


def python(
    *arguments: str, installed: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed wheel and without this checkout.

    ``-S`` with the libraries as a plain folder: the .pth file of an editable install is not read.
    """
    path = f"{installed}:{sysconfig.get_path('purelib')}"
    return subprocess.run(
        [sys.executable, "-P", "-S", *arguments],
        cwd=installed,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_only_visq_is_put_into_site_packages(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"visq", "visq-0.1.0.dist-info"}


def test_the_wheel_holds_what_the_servers_need_and_no_rubbish(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = ["api/main.py", "models/tables.py", "worker/main.py", "migrations/script.py.mako"]
    model = [f"worker/small_model/{file}" for file in ("config.json", "model.safetensors")]
    assert {f"visq/_rooms/{name}" for name in needed + model} <= names
    assert any(name.startswith("visq/_rooms/migrations/versions/") for name in names)
    assert "visq/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".db"))]


def test_the_installed_command_runs(installed: Path) -> None:
    done = python("-m", "visq", "--help", installed=installed)
    assert done.returncode == 0, done.stderr
    assert "worker" in done.stdout


def test_the_client_and_the_consumer_import_no_server_library(installed: Path) -> None:
    code = (
        "import sys, visq; visq.Client, visq.AsyncClient, visq.consume; import visq.cli.main;"
        f"print([name for name in {SERVER_LIBRARIES!r} if name in sys.modules], visq.__file__)"
    )
    done = python("-c", code, installed=installed)
    assert done.stdout.strip() == f"[] {installed}/visq/__init__.py", done.stderr


def test_the_rooms_are_found_once_they_are_mounted(installed: Path) -> None:
    code = (
        "import importlib.util as u; before = u.find_spec('models');"
        "from visq.rooms import mount; mount(); mount();"
        "import models.tables, worker.queue, api.main, migrations.run;"
        "print(before, models.__file__)"
    )
    done = python("-c", code, installed=installed)
    assert done.stdout.strip() == f"None {installed}/visq/_rooms/models/__init__.py", done.stderr


def test_the_installed_migrations_run(installed: Path, tmp_path: Path) -> None:
    done = python("-m", "visq", "migrate", installed=installed, VISQ_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "visq.db").exists()


def test_a_program_with_a_package_of_the_same_name_is_told_so(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from visq.rooms import mount\n"
        "try: mount(guest=True)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = python("-c", code, str(tmp_path), installed=installed)
    assert done.stdout.startswith("ConfigurationError visq needs the name `models`"), done.stderr
