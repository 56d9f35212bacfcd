"""Blocks of the KV cache in the host's memory, for sessions whose next turn comes minutes later.

::

    a turn ends        its full blocks are copied here       (beside the work of the device)
    the next turn      blocks that the device has evicted meanwhile are copied back

Named by their hashes, like those on the device: whatever fits a prompt's beginning is found, and
the one unused for longest goes first. Only the model's thread comes here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import torch

from worker.engine.attention import KVCache
from worker.engine.blocks import BlockPool


@dataclass(slots=True)
class _Copying:
    """Blocks on their way to the host: held until they have arrived."""

    blocks: list[int]
    arrived: Any
    """A CUDA event."""


class HostTier:
    def __init__(self, cache: KVCache, pool: BlockPool, nbytes: int) -> None:
        """
        :param nbytes: most memory to take; on CUDA it is pinned, at once.
        """
        self._cache = cache
        self._pool = pool
        block = cache.pool[0]
        count = nbytes // (block.numel() * block.element_size())
        self._cuda = block.is_cuda
        self._memory = torch.empty((count, *block.shape), dtype=block.dtype, pin_memory=self._cuda)
        self._stream: Any = torch.cuda.Stream(block.device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._free = list(range(count))
        self._places: OrderedDict[bytes, int] = OrderedDict()  # oldest first
        self._copying: list[_Copying] = []
        self.total = count
        self.hits = 0
        """Blocks that were copied back."""

    @property
    def used(self) -> int:
        """Blocks that are here."""
        return len(self._places)

    def keep(self, hashes: ListLike[bytes], blocks: ListLike[int]) -> None:
        """Copy blocks of the device that are not here yet.

        :param blocks: held ones, whose content is complete, in the order of a sequence.
        """
        new: list[tuple[int, int]] = []
        # The end of a sequence first: it is of no use without the beginning, so it goes before it.
        for name, block in reversed(list(zip(hashes, blocks, strict=True))[: self.total]):
            if name in self._places:
                self._places.move_to_end(name)
                continue
            place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
            self._places[name] = place
            new.append((place, block))
        if not new:
            return
        if not self._cuda:
            self._copy_out(new)
            return
        # Held, so that nobody writes to them before they have been read.
        held = [block for _, block in new]
        self._pool.hold(held)
        self._stream.wait_stream(torch.cuda.current_stream(self._cache.pool.device))
        with torch.cuda.stream(self._stream):
            self._copy_out(new)
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        self._copying.append(_Copying(held, arrived))

    def _copy_out(self, pairs: ListLike[tuple[int, int]]) -> None:
        for place, block in pairs:
            self._memory[place].copy_(self._cache.pool[block], non_blocking=True)

    def look(self, *, wait: bool = False) -> None:
        """Give back the blocks that have arrived; `wait` for all."""
        while self._copying and (wait or self._copying[0].arrived.query()):
            first = self._copying.pop(0)
            first.arrived.synchronize()
            self._pool.release(first.blocks)

    def match(self, hashes: ListLike[bytes]) -> list[int]:
        """Copy the longest known beginning of `hashes` to the device, as far as there are blocks;
        returns these, held and registered."""
        found: list[bytes] = []
        for name in hashes:
            if name not in self._places:
                break
            found.append(name)
        blocks: list[int] = []
        for name in found:
            new = self._pool.allocate(1)
            if new is None:
                break
            place = self._places[name]
            # (In the order of the device's work: behind what was there before, and behind the copy
            # to this place, before whoever reads it.)
            if self._cuda:
                torch.cuda.current_stream(self._cache.pool.device).wait_stream(self._stream)
            self._cache.pool[new[0]].copy_(self._memory[place], non_blocking=True)
            self._pool.register(new[0], name)
            blocks += new
        for name in reversed(found):
            self._places.move_to_end(name)
        self.hits += len(blocks)
        return blocks
