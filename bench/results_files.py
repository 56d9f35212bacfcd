"""Results of benchmarks: what was measured where, as JSON and as Markdown in ``bench/results/``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "bench" / "results"

PACKAGES: Final = ("torch", "transformers", "xformers", "triton", "lmdeploy", "celery")


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions() -> dict[str, Any]:
    """Where and on what something is measured: date, commit, machine, versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": _machine(),
        "load average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **_versions()},
    }


def write(name: str, folder: Path, markdown: str, values: Mapping[str, Any]) -> Path:
    """Write ``folder/name.md`` and ``folder/name.json``; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    path = folder / f"{name}.md"
    path.write_text(markdown.rstrip() + "\n", encoding="utf-8")
    return path


def described(where: Mapping[str, Any]) -> str:
    """`conditions` as a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['date']}, commit {where['commit']}, {where['machine']}, load average "
        f"{where['load average']:.1f} at the start; {versions}."
    )


def _commit() -> str:
    """Of the working tree, with ``+`` if it differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        code = ("worker", "visq", "models", "api")
        changed = git("status", "--porcelain", "--", *code)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        return os.environ.get("VISQ_BENCH_COMMIT", "unknown")


def _machine() -> str:
    cores = f"{os.cpu_count()} cores of {_processor()}"
    try:
        import torch
    except ImportError:
        return cores
    if not torch.cuda.is_available():
        return cores
    return f"{torch.cuda.get_device_name()}, {cores}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
