"""What the clients of a round were promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.faults.pictures import Pictures


@dataclass(frozen=True)
class Asked:
    """What a job was asked."""

    prompt: str
    pictures: tuple[str, ...] = ()
    """Their names, ``s3://``."""
    poison: bool = False
    missing: bool = False
    """It has a picture that does not exist."""
    may_be_cancelled: bool = False
    may_expire: bool = False
    wrong: bool = False
    """It is a line of a file that asks nothing that can be done."""


@dataclass(frozen=True)
class AskedLine:
    """A line of a batch's file."""

    asked: Asked
    custom_id: str | None
    """As its job has it: of a line that has none, or that of an earlier one, ``None``."""
    after: str | None = None
    """`custom_id` of the turn before it, in a session of the batch."""
    opens_session: bool = False
    equal: bool = False
    """It asks for the same as all others of its file that are."""


@dataclass(frozen=True)
class AskedFile:
    """A batch from a file."""

    input_uri: str
    output_uri: str
    lines: Sequence[AskedLine]
    """By position."""

    @property
    def chains(self) -> list[list[str]]:
        """The sessions: `custom_id` of their turns, in order."""
        chains = [[line.custom_id] for line in self.lines if line.opens_session and line.custom_id]
        for line in self.lines:
            for chain in chains:
                if line.after == chain[-1] and line.custom_id:
                    chain.append(line.custom_id)
        return chains


@dataclass
class Ledger:
    """All that was accepted in one round. Filled by many threads."""

    jobs: dict[str, Asked] = field(default_factory=dict)
    """By job id: single jobs and turns."""
    turns: dict[str, list[str]] = field(default_factory=dict)
    """By session id: the job ids of its turns, in the order in which they were accepted."""
    deleted: set[str] = field(default_factory=set)
    """Of the sessions."""
    batches: dict[str, dict[str, Asked]] = field(default_factory=dict)
    """By batch id: its items by ``custom_id``."""
    files: dict[str, AskedFile] = field(default_factory=dict)
    """By batch id."""
    objects: set[str] = field(default_factory=set)
    """Names of the files that were put into the store for them."""
    cancelled: set[str] = field(default_factory=set)
    """Of the batches."""
    retries: Counter[str] = field(default_factory=Counter)
    """By job id: how often it was asked to be retried, answered or not."""
    pictures: Pictures = field(default_factory=Pictures)
    problems: list[str] = field(default_factory=list)
    """What a client met that it must not meet."""

    @property
    def total(self) -> int:
        batches = [*self.batches.values(), *(file.lines for file in self.files.values())]
        return len(self.jobs) + sum(len(items) for items in batches)
