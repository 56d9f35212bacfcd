"""pyproject.toml declares what each room imports, and what it declares is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"api", "bench", "migrations", "models", "tests", "tools", "visq", "worker"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAZY_IN_VISQ = {
    "all": ["visq/embedded"],
    "parquet": ["visq/batch_files/parquet.py", "visq/batch_files/parquet_results.py"],
    "worker": [
        "visq/logs.py",
        "visq/objects",
        "visq/pipeline/collecting.py",
        "visq/pipeline/local.py",
        "visq/pixels.py",
        "visq/vl/__init__.py",
        "visq/vl/encoding.py",
        "visq/vl/pictures.py",
    ],
}
"""Parts of `visq` that only a server uses; the rest must do with the plain install."""

PART_OF = {
    "amqp": "kombu",
    "botocore": "boto3",
    "httpcore2": "httpx2",
    "huggingface_hub": "transformers",
    "langchain_core": "langchain-openai",
    "starlette": "fastapi",
    "tokenizers": "transformers",
    "triton": "torch",
}
"""Libraries that come with another one and are the public face of a part of it."""


RUN_BY_HAND = ("tests/worker/engine/loaders/sentencepiece/make.py",)
"""Programs that made files which are kept; each says itself what it needs."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Names of the distributions that a plain install and `extras` ask for."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    names = {normal(re.split(r"[\s<>=!~;\[]", line)[0]) for line in lines}
    more = {part for line in lines if line.startswith("visq[") for part in _extras(line)}
    return (names | (declared(*more) if more else set())) - {"visq"}


def _extras(line: str) -> list[str]:
    return line[line.index("[") + 1 : line.index("]")].split(",")


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (top-level name, file) of each third-party import below `path`."""
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for node in at_run_time(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = PART_OF.get(name.split(".")[0], name.split(".")[0])
                if top not in sys.stdlib_module_names | ROOMS:
                    yield top, str(file.relative_to(ROOT))


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Walk `node` without what only a type checker sees."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from at_run_time(child)


@cache
def distributions() -> dict[str, set[str]]:
    return {
        module: {normal(name) for name in names}
        for module, names in packages_distributions().items()
    }


def undeclared(folder: str, extras: list[str], but: tuple[str, ...] = ()) -> list[str]:
    allowed = declared(*extras)
    return sorted(
        {
            f"{file} imports {top}"
            for top, file in imported(ROOT / folder)
            if not file.startswith(but) and not distributions().get(top, {top}) & allowed
        }
    )


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("models", ["api"]),
        ("models", ["worker"]),
        ("migrations", ["api"]),
        ("migrations", ["worker"]),
        ("api", ["api"]),
        ("worker", ["worker"]),
        ("worker/queue", ["api"]),
        ("tests", ["dev"]),
        ("bench", ["dev"]),
        *[(part, [extra]) for extra, parts in LAZY_IN_VISQ.items() for part in parts],
    ],
)
def test_a_room_imports_only_what_its_extra_installs(folder: str, extras: list[str]) -> None:
    assert undeclared(folder, extras, but=RUN_BY_HAND) == []


def test_the_plain_install_is_enough_for_the_client() -> None:
    servers_only = tuple(part for parts in LAZY_IN_VISQ.values() for part in parts)
    assert undeclared("visq", [], but=(*servers_only, "visq/cli/server_commands.py")) == []


def test_every_dependency_is_pinned_once() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    names = [normal(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))
    assert declared("dev") <= set(names)
    assert not [line for line in lines if "+" in line or "@" in line or "==" not in line]


def test_no_library_of_the_gpu_is_dragged_onto_a_machine_without_one() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"(?m)^(nvidia|triton|cuda)", pins)
