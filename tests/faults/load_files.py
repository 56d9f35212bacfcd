"""Files of items, as a batch of the rounds reads them: plain ones, equal ones, sessions, and lines
that are wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from tests.faults.ledger import Asked, AskedFile, AskedLine


def file_of(
    chance: random.Random,
    name: str,
    count: int,
    ask: Callable[[random.Random, str], Asked],
    steps: int,
) -> tuple[bytes, AskedFile]:
    """A file of `count` lines, and what it asks for.

    :param ask: makes a question of some words.
    :param steps: of the engine for each answer.
    """
    same = Asked(f"equal: {uuid4().hex[:12]}")
    lines: list[AskedLine] = []
    written: list[bytes] = []
    for n in range(count):
        custom_id = f"line-{n}"
        match n % 10:
            case 2 | 8:
                line = AskedLine(same, custom_id, equal=True)
            case 4:
                line = AskedLine(_plain(f"first {n}"), custom_id, opens_session=True)
            case 5 | 6:
                line = AskedLine(_plain(f"next {n}"), custom_id, after=f"line-{n - 1}")
            case 9:
                wrong = Asked("", wrong=True)
                # Not JSON; nothing that is asked; the name of another one.
                line = AskedLine(wrong, custom_id if n % 30 == 19 else None)
            case _:
                line = AskedLine(ask(chance, f"line {n}"), custom_id)
        lines.append(line)
        written.append(_written(line, n, steps))
    return b"".join(written), AskedFile(f"{name}-in.jsonl", f"{name}-out.jsonl", lines)


def _plain(what: str) -> Asked:
    """Without a picture: nothing that becomes of one is to end the session's turns."""
    return Asked(f"{what}: {uuid4().hex[:12]}")


def _written(line: AskedLine, n: int, steps: int) -> bytes:
    if line.asked.wrong:
        wrong = ["{", {"custom_id": f"line-{n}"}, {"custom_id": "line-0", "prompt": "again"}]
        which = wrong[n % 30 // 10]
        return (which if isinstance(which, str) else json.dumps(which)).encode() + b"\n"
    item: dict[str, Any] = {
        "custom_id": line.custom_id,
        "prompt": line.asked.prompt,
        "images": list(line.asked.pictures),
        "gen_config": {"max_new_tokens": steps},
    }
    if line.opens_session:
        item["session"] = {}
    if line.after is not None:
        item["after"] = line.after
    return json.dumps(item).encode() + b"\n"
