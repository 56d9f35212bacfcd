"""Names of the files that a batch writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_ENDING: Final = re.compile(r"(\.(?:jsonl|ndjson)(?:\.gz)?|\.parquet)$")


@dataclass(frozen=True)
class OutputNames:
    """``s3://`` names."""

    output: str
    """Every item, in input order."""
    errors: str
    """Those that did not succeed, as JSON lines."""
    summary: str
    """The batch, as JSON."""


def output_names(uri: str) -> OutputNames:
    """The names for an `output_uri`: a file, and others beside it, or a prefix for all of them."""
    if uri.endswith("/"):
        return OutputNames(f"{uri}output.jsonl", f"{uri}errors.jsonl", f"{uri}summary.json")
    stem = _ENDING.sub("", uri)
    return OutputNames(uri, f"{stem}.errors.jsonl", f"{stem}.summary.json")


def has_known_ending(uri: str) -> bool:
    """Whether the name says in which format the file is."""
    return _ENDING.search(uri) is not None
