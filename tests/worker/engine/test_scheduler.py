"""The scheduler against a simulated model that remembers what was written where.

The simulated cache holds, for each place of each block, a digest of everything up to that token.
Before a sequence gets a token, the whole of its past must be readable from its blocks; so a block
given away too early, shared by mistake or not written at all is seen at once.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.blocks import BlockPool
from worker.engine.families.base import ImageFeatures, PreparedImage
from worker.engine.keys import root_key
from worker.engine.scheduler import Limits, Scheduler, Step
from worker.engine.sequence import ImageSpan, Sequence
from worker.engine.vision import VisionCache

VOCABULARY = 4
IMAGE = 9
STOP = 0


def digest(before: bytes, token: object) -> bytes:
    return hashlib.blake2b(before + repr(token).encode(), digest_size=8).digest()


def next_token(past: bytes) -> int:
    return STOP if past[0] < 10 else 1 + past[0] % VOCABULARY


def reference(sequence: Sequence) -> list[int]:
    """The answer of a sequence that is computed alone, from nothing."""
    tokens = list(sequence.token_ids)
    while len(tokens) < sequence.max_tokens:
        tokens.append(next_token(past_of(sequence, tokens)))
        if tokens[-1] == STOP:
            break
    return tokens[sequence.prompt_tokens :]


def past_of(sequence: Sequence, tokens: list[int]) -> bytes:
    past = b""
    for at, token in enumerate(tokens):
        past = digest(past, content(sequence, at, token))
    return past


def content(sequence: Sequence, at: int, token: int) -> object:
    """What the token at index `at` means: of a picture's tokens, which one of which picture."""
    for image in sequence.images:
        if image.start <= at < image.end:
            return image.key, at - image.start
    return token


@dataclass(eq=False)
class Simulator:
    """Runs steps as the device would, one after the other; the host hears of them later."""

    limits: Limits
    pool: BlockPool
    vision: VisionCache
    prefix_caching: bool = True
    memory: dict[tuple[int, int], bytes] = field(default_factory=dict)
    tokens: dict[Sequence, list[int]] = field(default_factory=dict)
    """Of each sequence, those too that the host does not know yet."""
    answers: dict[Sequence, list[int]] = field(default_factory=dict)
    encoded: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.limits, self.pool, self.vision, prefix_caching=self.prefix_caching
        )

    def add(self, sequence: Sequence) -> None:
        self.tokens[sequence] = list(sequence.token_ids)
        self.scheduler.add(sequence)

    def launch(self, step: Step) -> list[tuple[Sequence, int]]:
        self.check(step)
        for image in step.encode:
            self.encoded += 1
            features = ImageFeatures(torch.zeros(image.tokens, 1))
            self.vision.put(image.key, features)
            for chunk in step.chunks:
                for each in chunk.sequence.images_in(chunk.start, chunk.end):
                    if each.key == image.key:
                        each.features, each.prepared = features, None
        for sequence, image in step.unprepared:
            image.prepared = PreparedImage([], {})
            self.scheduler.unpark(sequence)
        sampled = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            for image in sequence.images_in(chunk.start, chunk.end):
                assert image.features is not None, "a picture is read before it is encoded"
            past = self.read(sequence, chunk.start)
            for at in range(chunk.start, chunk.end):
                past = digest(past, content(sequence, at, self.tokens[sequence][at]))
                self.memory[self.place(sequence, at)] = past
            if chunk.samples:
                assert chunk.end == len(self.tokens[sequence])
                self.tokens[sequence].append(next_token(past))
                sampled.append((sequence, self.tokens[sequence][-1]))
        self.scheduler.launched(step)
        return sampled

    def read(self, sequence: Sequence, end: int) -> bytes:
        """Check that the cache holds the sequence's first `end` tokens."""
        past = b""
        for at in range(end):
            past = digest(past, content(sequence, at, self.tokens[sequence][at]))
            assert self.memory.get(self.place(sequence, at)) == past, "the cache holds other tokens"
        return past

    def place(self, sequence: Sequence, at: int) -> tuple[int, int]:
        size = self.limits.block_size
        return sequence.blocks[at // size], at % size

    def finish(self, step: Step, sampled: list[tuple[Sequence, int]]) -> None:
        for sequence, token in sampled:
            if not sequence.ended:
                sequence.pending -= 1
                sequence.token_ids.append(token)
                if token == STOP or len(sequence.token_ids) == sequence.max_tokens:
                    sequence.ended = True
        self.scheduler.finished(step)
        for sequence, _ in sampled:
            if sequence.ended and self.scheduler.knows(sequence):
                self.answers[sequence] = sequence.token_ids[sequence.prompt_tokens :]
                self.scheduler.remove(sequence)

    def check(self, step: Step) -> None:
        """What holds of every step."""
        assert step.tokens <= self.limits.max_step_tokens
        assert len(self.scheduler.running) <= self.limits.max_sequences
        assert len({s.slot for s in self.scheduler.running}) == len(self.scheduler.running)
        assert len({chunk.sequence for chunk in step.chunks}) == len(step.chunks)
        encoded = sum(image.tokens for image in step.encode)
        assert encoded <= self.limits.max_encode_tokens or len(step.encode) == 1
        assert len({image.key for image in step.encode}) == len(step.encode)
        held = {block for sequence in self.scheduler.running for block in sequence.blocks}
        assert self.pool.held == len(held)


def sequence(
    arrival: int, prompt: list[int], room: int, *, lane: int = 0, feedback: bool = False
) -> Sequence:
    """A sequence; runs of the token ``IMAGE + n`` in `prompt` are picture n."""
    images = []
    start = 0
    while start < len(prompt):
        end = start + 1
        if prompt[start] >= IMAGE:
            while end < len(prompt) and prompt[end] == prompt[start]:
                end += 1
            key = root_key("image", str(prompt[start]))
            prepared = PreparedImage([], {})
            images.append(ImageSpan(start, end, key, [(start, end, 0)], len(images), prepared))
        start = end
    return Sequence(
        order=(lane, arrival, 0),
        token_ids=[IMAGE if token >= IMAGE else token for token in prompt],
        prompt_tokens=len(prompt),
        max_tokens=len(prompt) + room,
        positions=torch.arange(len(prompt)).unsqueeze(0),
        delta=0,
        images=images,
        root=root_key("kv"),
        needs_feedback=feedback,
    )


LIMITS = Limits(block_size=4, max_step_tokens=16, max_encode_tokens=8, max_sequences=4)

text = st.lists(st.integers(1, 2), min_size=1, max_size=6)
picture = st.tuples(st.integers(IMAGE, IMAGE + 2), st.integers(1, 7)).map(lambda p: [p[0]] * p[1])
prompts = st.tuples(text, st.lists(st.tuples(picture, text), max_size=3)).map(
    lambda parts: [*parts[0], *(t for image, words in parts[1] for t in [*image, *words])]
)
requests = st.lists(
    st.tuples(prompts, st.integers(1, 12), st.integers(0, 2), st.booleans()),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(
    requests=requests,
    block_size=st.integers(1, 5),
    step_tokens=st.integers(1, 40),
    slots=st.integers(1, 5),
    blocks=st.integers(0, 12),
    vision_bytes=st.sampled_from([0, 16, 10_000]),
    overlap=st.booleans(),
    prefix_caching=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_answer_is_that_of_a_sequence_alone(
    requests: list[tuple[list[int], int, int, bool]],
    block_size: int,
    step_tokens: int,
    slots: int,
    blocks: int,
    vision_bytes: int,
    overlap: bool,
    prefix_caching: bool,
    seed: int,
) -> None:
    chance = random.Random(seed)
    longest = max(len(prompt) + room for prompt, room, _, _ in requests)
    pool = BlockPool(1 + -(-longest // block_size) + blocks)
    simulator = Simulator(
        Limits(block_size, step_tokens, max(1, step_tokens // 2), slots),
        pool,
        VisionCache(vision_bytes),
        prefix_caching,
    )
    todo = [
        sequence(arrival, prompt, room, lane=lane, feedback=feedback)
        for arrival, (prompt, room, lane, feedback) in enumerate(requests)
    ]
    expected = {each: reference(each) for each in todo}
    cancelled: set[Sequence] = set()
    before: tuple[Step, list[tuple[Sequence, int]]] | None = None
    for _ in range(2000):
        if todo and chance.random() < 0.5:
            simulator.add(todo.pop(0))
        alive = [s for s in expected if simulator.scheduler.knows(s)]
        if alive and chance.random() < 0.05:
            victim = chance.choice(alive)
            victim.ended = True
            cancelled.add(victim)
            simulator.scheduler.remove(victim)
        step = simulator.scheduler.plan()
        after = (step, simulator.launch(step))
        if not overlap:
            simulator.finish(*after)
        else:
            if before is not None:
                simulator.finish(*before)
            before = after
        if not todo and not simulator.scheduler.busy:
            break
    else:
        raise AssertionError("it goes on for ever")
    if before is not None:
        simulator.finish(*before)
    for each, answer in expected.items():
        if each not in cancelled:
            assert simulator.answers[each] == answer
    assert pool.held == 0
    assert pool.available == pool.total


def run(simulator: Simulator) -> list[Step]:
    steps = []
    while simulator.scheduler.busy:
        step = simulator.scheduler.plan()
        simulator.finish(step, simulator.launch(step))
        steps.append(step)
        assert len(steps) < 1000
    return steps


def simulator(*, blocks: int = 40, limits: Limits = LIMITS) -> Simulator:
    return Simulator(limits, BlockPool(blocks), VisionCache(10_000))


def test_a_repeated_prompt_is_computed_once() -> None:
    shared = simulator()
    shared.add(sequence(0, [1, 2] * 8, 1))
    run(shared)
    shared.add(again := sequence(1, [1, 2] * 8, 1))
    steps = run(shared)
    assert again.cached_tokens == 12, "all full blocks but the one with the last token"
    assert sum(step.tokens for step in steps) == 4


def test_the_same_text_with_another_picture_shares_no_block_of_it() -> None:
    shared = simulator()
    shared.add(sequence(0, [1, 1, 1, 1] + [IMAGE] * 8 + [2] * 4, 1))
    run(shared)
    other = sequence(1, [1, 1, 1, 1] + [IMAGE + 1] * 8 + [2] * 4, 1)
    shared.add(other)
    run(shared)
    assert other.cached_tokens == 4, "only what stands before the picture"
    assert shared.encoded == 2


def test_a_prefix_hit_that_covers_a_picture_needs_no_vision() -> None:
    shared = simulator()
    shared.vision = VisionCache(0)
    shared.add(sequence(0, [IMAGE] * 8 + [2] * 3, 1))
    run(shared)
    encoded = shared.encoded
    shared.add(sequence(1, [IMAGE] * 8 + [1] * 3, 1))
    run(shared)
    assert shared.encoded == encoded


def test_one_picture_of_many_requests_is_encoded_once() -> None:
    shared = simulator()
    for arrival in range(4):
        shared.add(sequence(arrival, [1 + arrival % 2, IMAGE, IMAGE, 1], 2))
    run(shared)
    assert shared.encoded == 1


def test_decodes_are_not_held_up_by_a_long_prompt() -> None:
    shared = simulator()
    prompts_of_talkers = ([1] * length for length in range(1, 20))
    talkers = (sequence(0, prompt, 30) for prompt in prompts_of_talkers)
    shared.add(talker := next(each for each in talkers if len(reference(each)) > 6))
    step = shared.scheduler.plan()
    shared.finish(step, shared.launch(step))
    shared.add(sequence(1, [1] * 60, 1))
    for _ in range(3):
        step = shared.scheduler.plan()
        assert step.decodes[0].sequence is talker
        assert step.prefills
        shared.finish(step, shared.launch(step))


def test_a_better_lane_goes_first_and_takes_the_place_of_a_worse_one() -> None:
    shared = simulator(limits=replace(LIMITS, max_sequences=1))
    shared.add(batch := sequence(0, [1, 1, 1], 5, lane=2))
    step = shared.scheduler.plan()
    shared.finish(step, shared.launch(step))
    shared.add(chat := sequence(1, [2, 2, 2], 1, lane=0))
    run(shared)
    assert list(shared.answers) == [chat, batch]
    assert shared.scheduler.preemptions == 1


def test_a_full_cache_drives_out_the_last_and_all_end_well() -> None:
    shared = simulator(blocks=1 + 8)
    many = [sequence(arrival, [1 + arrival % 2] * 9, 12) for arrival in range(4)]
    expected = [reference(each) for each in many]
    for each in many:
        shared.add(each)
    run(shared)
    assert shared.scheduler.preemptions > 0
    assert [shared.answers[each] for each in many] == expected
