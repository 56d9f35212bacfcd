"""The rounds as a table of Markdown, for docs/reliability.md."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

HEAD: Final = (
    "scenario",
    "rounds",
    "jobs",
    "struck",
    "more than one attempt",
    "lost",
    "doubled",
    "out of order",
    "other violations",
    "slowest round (s)",
)
COLUMNS: Final = ("lost", "doubled", "out of order")
"""Kinds of violations with a column of their own. An event with two ids counts as doubled."""


def as_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """:param rounds: `tests.faults.rounds.Round`, as dicts (the lines of ``--report``)."""
    by_scenario: dict[str, list[Mapping[str, Any]]] = {}
    for each in rounds:
        by_scenario.setdefault(each["scenario"], []).append(each)
    lines = [_line(HEAD), _line(["---"] + ["---:"] * (len(HEAD) - 1))]
    lines += [_line(_row(name, found)) for name, found in sorted(by_scenario.items())]
    lines.append(_line(_row("**all**", rounds)))
    return "\n".join([*lines, "", _where(rounds)])


def _row(name: str, rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    struck = sum(each["struck"] > 0 for each in rounds)
    again = sum(
        jobs for each in rounds for tries, jobs in each["attempts"].items() if int(tries) > 1
    )
    kinds = Counter(_kind(violation) for each in rounds for violation in each["violations"])
    slowest = max((each["seconds"] for each in rounds), default=0.0)
    return [
        name,
        str(len(rounds)),
        f"{sum(each['jobs'] for each in rounds):,}",
        str(struck),
        f"{again:,}",
        *(str(kinds[kind]) for kind in (*COLUMNS, "other")),
        f"{slowest:.1f}",
    ]


def _kind(violation: str) -> str:
    kind = violation.partition(":")[0]
    return {"told twice": "doubled"}.get(kind, kind if kind in COLUMNS else "other")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _where(rounds: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted(each["seed"] for each in rounds)
    span = f"{seeds[0]} to {seeds[-1]}" if seeds else "none"
    return (
        "Struck: rounds in which the fault met something to break. More than one attempt: "
        "jobs that fail and are retried by a call (a few in each round) are among them. "
        f"Seeds {span}; commit {_commit()}; {os.cpu_count()} cores, {platform.machine()}; "
        f"{datetime.now(UTC):%Y-%m-%d}."
    )


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
