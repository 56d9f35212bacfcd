"""Who holds which block of the KV cache, and which blocks can be used again by their content.

A block is in one of three states::

    free ──allocate──► held (by one or more sequences) ──release──► free
                         ▲                               └────────► cached, if it was registered
                         └─────────────── match ─────────────────────┘
    cached ──allocate, if nothing is free: the one unused for longest──► held

Only numbers here; the memory itself is `worker.engine.attention.KVCache`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

PADDING: Final = 0
"""The block that no sequence gets: padding reads it."""


class BlockPool:
    """Blocks 1 to `count` - 1."""

    def __init__(self, count: int) -> None:
        """:param count: number of blocks, with the one for padding."""
        self._free = list(range(count - 1, PADDING, -1))
        self._holders: dict[int, int] = {}  # block -> number of sequences that hold it
        self._cached: OrderedDict[int, None] = OrderedDict()  # held by nobody; oldest first
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.total = count - 1

    @property
    def available(self) -> int:
        """Blocks that `allocate` could give now."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """Blocks that sequences hold."""
        return len(self._holders)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Hold and return the blocks of the longest known beginning of `hashes`."""
        found: list[int] = []
        for each in hashes:
            block = self._by_hash.get(each)
            if block is None:
                break
            self._cached.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """Hold `count` blocks of undefined content; ``None`` (and none held) if there are fewer."""
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def hold(self, blocks: Sequence[int]) -> None:
        """Hold blocks that are held already once more."""
        for block in blocks:
            self._holders[block] += 1

    def register(self, block: int, hash_: bytes) -> None:
        """The content of a held block is complete: others may use it.

        A second block of the same content stays without a name.
        """
        if hash_ not in self._by_hash and block not in self._hash_of:
            self._by_hash[hash_] = block
            self._hash_of[block] = hash_

    def release(self, blocks: Sequence[int]) -> None:
        """Hold `blocks`, in the order of a sequence, no longer."""
        for block in reversed(
            blocks
        ):  # what comes last is of use to the fewest: it is evicted first
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._by_hash[self._hash_of.pop(block)]
        self._holders[block] = 1
        return block
