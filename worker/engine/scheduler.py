"""Which tokens of which sequences the next step computes.

Sequences that decode come first, one token each; then chunks of prompts, as far as the step's
budget of tokens goes; better lanes first, older ones first inside a lane. A sequence enters when
there is a slot and room for its next chunk. If the cache is full, the last in this order gives its
blocks back and is computed again later ("preemption by recompute"): whatever was registered in the
prefix cache meanwhile, it finds again.

Knows tokens and blocks; the memory and the model are the runner's.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Final

from worker.engine.blocks import BlockPool
from worker.engine.host_tier import HostTier
from worker.engine.sequence import ImageSpan, Sequence
from worker.engine.vision import VisionCache

GROW_AFTER: Final = 256
"""Good steps before the limits that an end of memory has halved are doubled again."""

_ORDER = attrgetter("order")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``end`` of a sequence."""

    sequence: Sequence
    start: int
    end: int
    samples: bool
    """Whether the next token of the sequence is sampled after them."""


@dataclass(slots=True)
class Step:
    """What one forward pass computes."""

    decodes: list[Chunk] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    encode: list[ImageSpan] = field(default_factory=list)
    """Pictures to encode before it; at most one of each content."""
    admitted: list[Sequence] = field(default_factory=list)
    """Sequences that have just got their slot."""
    unprepared: list[tuple[Sequence, ImageSpan]] = field(default_factory=list)
    """Pictures that must be encoded, but whose pixels are not there (any more)."""

    @property
    def chunks(self) -> list[Chunk]:
        return [*self.decodes, *self.prefills]

    def keep(self, wanted: Callable[[Chunk], bool]) -> None:
        """Drop the chunks that are not `wanted`, and the pictures that only they show."""
        self.decodes = [chunk for chunk in self.decodes if wanted(chunk)]
        self.prefills = [chunk for chunk in self.prefills if wanted(chunk)]
        shown = {
            image.key
            for chunk in self.prefills
            for image in chunk.sequence.images_in(chunk.start, chunk.end)
        }
        self.encode = [image for image in self.encode if image.key in shown]

    def group_adapters(self) -> None:
        """Set the chunks of one adapter side by side, so that its tokens are rows of one slice."""
        for chunks in (self.decodes, self.prefills):
            if any(chunk.sequence.adapter is not None for chunk in chunks):
                chunks.sort(key=_adapter)

    @property
    def tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)


def _adapter(chunk: Chunk) -> int:
    adapter = chunk.sequence.adapter
    return 0 if adapter is None else adapter.serial


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step and of the running batch."""

    block_size: int
    max_step_tokens: int
    """Most tokens that one step computes."""
    max_encode_tokens: int
    """Most image tokens that one step encodes; a larger picture is encoded alone."""
    max_sequences: int
    """Most sequences that run at a time."""


class Scheduler:
    def __init__(
        self,
        limits: Limits,
        pool: BlockPool,
        vision: VisionCache,
        *,
        prefix_caching: bool = True,
        tier: HostTier | None = None,
    ) -> None:
        """:param tier: where blocks are looked for that the device no longer has."""
        self._limits = self._configured = limits
        self._pool = pool
        self._vision = vision
        self._prefix_caching = prefix_caching
        self._tier = tier
        self._slots = list(range(limits.max_sequences - 1, -1, -1))
        self.waiting: list[Sequence] = []
        """Sorted by `Sequence.order`, as is `running`."""
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        """Sequences that can do nothing before the pixels of a picture come: they hold neither a
        slot nor blocks meanwhile."""
        self.suspects: list[Sequence] = []
        """Sequences of a step that failed: each is run alone, so that only the guilty one ends."""
        self._good_steps = 0
        self.preemptions = 0
        self.prefix_queries = 0
        """Prompt tokens that were looked up in the prefix cache."""
        self.prefix_hits = 0
        """Those of them that were found."""

    @property
    def busy(self) -> bool:
        """Whether there is anything to plan."""
        return bool(self.running or self.waiting)

    def knows(self, sequence: Sequence) -> bool:
        return sequence.slot >= 0 or sequence in self.waiting or sequence in self.parked

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_ORDER)

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended; its blocks stay known by their content."""
        if sequence in self.parked:
            self.parked.remove(sequence)
        elif sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._give_back(sequence)
        if sequence in self.suspects:
            self.suspects.remove(sequence)

    def unpark(self, sequence: Sequence) -> None:
        """The pixels have come for which the sequence may wait."""
        if sequence in self.parked:
            self.parked.remove(sequence)
            self.add(sequence)

    def suspect(self, step: Step) -> bool:
        """`step` has failed, and nothing of it counts; False if there is nobody to tell apart."""
        sequences = [chunk.sequence for chunk in step.chunks]
        if len(sequences) == 1:
            return False
        self.suspects += [each for each in sequences if each not in self.suspects]
        return True

    def shrink(self, step: Step) -> bool:
        """There was no memory for `step`: from now on, steps are smaller, and at last each of its
        sequences runs alone. False: it was one alone, in small steps; the limits are as before."""
        limits, size = self._limits, self._limits.block_size
        self._good_steps = 0
        if limits.max_step_tokens <= size:
            if self.suspect(step):
                return True
            self._limits = self._configured
            return False
        self._limits = replace(
            limits,
            max_step_tokens=max(limits.max_step_tokens // 2, size),
            max_encode_tokens=max(limits.max_encode_tokens // 2, 1),
        )
        if len(self.running) > 1:
            self._preempt(self.running[-1])
        return True

    def plan(self) -> Step:
        """The next step; it may be empty although sequences wait for a launched one."""
        step = Step()
        budget = self._limits.max_step_tokens
        preemptions = self.preemptions
        prefilling: list[Sequence] = []
        for sequence in self._candidates():
            if sequence.slot < 0:
                continue
            if not sequence.decoding:
                prefilling.append(sequence)
            elif budget and self._may_decode(sequence):
                length = sequence.length
                if self._make_room(sequence, length):
                    step.decodes.append(Chunk(sequence, sequence.computed, length, samples=True))
                    budget -= 1
        for sequence in prefilling:
            if budget and sequence.slot >= 0 and not sequence.pending:
                budget -= self._plan_prefill(sequence, step, budget)
        # Whoever was driven out in this step must not come back in it.
        while budget and self.waiting and self.preemptions == preemptions and not self.suspects:
            sequence = self.waiting[0]
            if sequence.pending or not self._admit(sequence):
                break
            step.admitted.append(sequence)
            budget -= self._plan_prefill(sequence, step, budget)
        if self.preemptions != preemptions:
            # Those that were driven out after their chunk had been planned.
            step.keep(lambda chunk: chunk.sequence.slot >= 0)
        if step.unprepared:
            self._park(step)
        step.group_adapters()
        return step

    def _park(self, step: Step) -> None:
        planned = {chunk.sequence for chunk in step.chunks}
        for sequence, _ in step.unprepared:
            if sequence.slot >= 0 and sequence not in planned and not sequence.pending:
                self.running.remove(sequence)
                self._give_back(sequence)
                self.parked.append(sequence)

    def _candidates(self) -> list[Sequence]:
        """Who may be in the next step."""
        running = [each for each in self.suspects if each.slot >= 0]
        if not running:
            self.suspects.clear()
            return list(self.running)
        return running[:1]

    def launched(self, step: Step) -> None:
        """`step` is on its way: what comes after it may be planned."""
        self._grow()
        for chunk in step.chunks:
            if chunk.sequence in self.suspects:
                self.suspects.remove(chunk.sequence)
            chunk.sequence.computed = chunk.end
            chunk.sequence.pending += chunk.samples
            for image in chunk.sequence.images:
                if image.end <= chunk.end:
                    image.features = image.prepared = None  # it has been read

    def _grow(self) -> None:
        """After many good steps, try larger ones again."""
        self._good_steps += 1
        if self._limits != self._configured and self._good_steps >= GROW_AFTER:
            self._good_steps = 0
            limits, most = self._limits, self._configured
            self._limits = replace(
                limits,
                max_step_tokens=min(2 * limits.max_step_tokens, most.max_step_tokens),
                max_encode_tokens=min(2 * limits.max_encode_tokens, most.max_encode_tokens),
            )

    def finished(self, step: Step) -> None:
        """`step` has run, and its tokens are known: full blocks may be shared from now on."""
        for chunk in step.chunks:
            sequence = chunk.sequence
            if self._prefix_caching and sequence.slot >= 0:
                self._register(sequence, min(chunk.end, sequence.computed))

    def _register(self, sequence: Sequence, computed: int) -> None:
        full = min(computed, len(sequence.token_ids)) // self._limits.block_size
        if full > sequence.registered:
            hashes = sequence.block_hashes(self._limits.block_size)
            for index in range(sequence.registered, full):
                self._pool.register(sequence.blocks[index], hashes[index])
            sequence.registered = full

    def _may_decode(self, sequence: Sequence) -> bool:
        """Of one that is decoding."""
        return not (sequence.complete or (sequence.needs_feedback and sequence.pending))

    def _plan_prefill(self, sequence: Sequence, step: Step, budget: int) -> int:
        """Plan as much of a prompt as possible; returns the number of its tokens."""
        start = sequence.computed
        end = min(start + budget, sequence.length)
        end = self._plan_encoding(sequence, step, start, end)
        if end > start and not self._make_room(sequence, end):
            end = start
        if end > start:
            samples = end == sequence.length
            step.prefills.append(Chunk(sequence, start, end, samples))
        return end - start

    def _plan_encoding(self, sequence: Sequence, step: Step, start: int, end: int) -> int:
        """Plan the encoding of the pictures in a chunk; returns where the chunk must end."""
        for image in sequence.images_in(start, end):
            if image.features is None:
                image.features = self._vision.get(image.key)
            if image.features is not None or any(image.key == e.key for e in step.encode):
                continue
            planned = sum(each.tokens for each in step.encode)
            if step.encode and planned + image.tokens > self._limits.max_encode_tokens:
                return max(start, image.start)
            if image.prepared is None:
                step.unprepared.append((sequence, image))
                return max(start, image.start)
            step.encode.append(image)
        return end

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence in, if there is a slot and room for its beginning. For a better
        lane, the last of a worse one is driven out."""
        if not self._slots:
            self._drive_out_for(sequence)
            return False
        size = self._limits.block_size
        matched: list[int] = []
        if self._prefix_caching and not sequence.wants_prompt_logits:
            # At least one token is computed, since its logits are needed.
            usable = (sequence.length - 1) // size
            hashes = sequence.block_hashes(size)[:usable]
            matched = self._pool.match(hashes)
            if self._tier is not None and len(matched) < usable:
                matched += self._tier.match(hashes[len(matched) :])
        computed = len(matched) * size
        chunk = min(sequence.length - computed, self._limits.max_step_tokens)
        # One block more for each running sequence, so that the newcomer does not drive them out.
        needed = self._blocks(computed + chunk) - len(matched) + len(self.running)
        if self.running and needed > self._pool.available:
            self._pool.release(matched)
            self._drive_out_for(sequence)
            return False
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached_tokens = computed
            self.prefix_queries += sequence.length
            self.prefix_hits += computed
        sequence.blocks = matched
        sequence.registered = len(matched)
        sequence.computed = computed
        sequence.slot = self._slots.pop()
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_ORDER)
        return True

    def _drive_out_for(self, sequence: Sequence) -> None:
        last = self.running[-1]
        if sequence.lane < last.lane:
            self._preempt(last)

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Give `sequence` the blocks for its first `tokens`; if need be, at the cost of the last in
        order. False: it was itself the last."""
        missing = self._blocks(tokens) - len(sequence.blocks)
        while missing > 0:
            new = self._pool.allocate(missing)
            if new is not None:
                sequence.blocks += new
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        insort(self.waiting, sequence, key=_ORDER)

    def _give_back(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        self._slots.append(sequence.slot)
        sequence.blocks = []
        sequence.slot = -1
        sequence.computed = sequence.registered = sequence.tabled = 0

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)
