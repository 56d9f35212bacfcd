"""Blocks of the KV cache: nobody's block is given away, none is lost, equal content is found."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from worker.engine.blocks import PADDING, BlockPool
from worker.engine.keys import block_hash, image_key, root_key


def hashes(*names: str) -> list[bytes]:
    chain = [root_key("test")]
    for name in names:
        chain.append(block_hash(chain[-1], [ord(letter) for letter in name], []))
    return chain[1:]


def test_a_registered_block_is_found_by_its_content_after_its_release() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block, name in zip(blocks, hashes("a", "b"), strict=True):
        pool.register(block, name)
    pool.release(blocks)
    assert pool.match(hashes("a", "b", "c")) == blocks
    assert pool.held == 2


def test_a_block_counts_only_with_everything_before_it() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block, name in zip(blocks, hashes("a", "b"), strict=True):
        pool.register(block, name)
    assert pool.match(hashes("x", "b")) == []
    assert pool.match(hashes("b")) == []


def test_the_end_of_what_was_unused_for_longest_is_evicted_first() -> None:
    pool = BlockPool(5)
    old, new = hashes("a", "b"), hashes("x", "y")
    for names in (old, new):
        blocks = pool.allocate(2)
        assert blocks is not None
        for block, name in zip(blocks, names, strict=True):
            pool.register(block, name)
        pool.release(blocks)
    pool.release(pool.match(old))  # used again
    assert pool.allocate(1) is not None
    found = {len(pool.match(names)) for names in (old,)}
    assert found == {2}
    assert len(pool.match(new)) == 1


def test_more_than_there_is_is_not_given_in_part() -> None:
    pool = BlockPool(3)
    assert pool.allocate(3) is None
    assert pool.available == pool.total == 2
    assert PADDING not in (pool.allocate(2) or [PADDING])


def test_another_picture_another_salt_or_another_place_make_another_name() -> None:
    key = image_key("tenant", "ab" * 32, 10, 20)
    others = {
        image_key("other", "ab" * 32, 10, 20),
        image_key("tenant", "cd" * 32, 10, 20),
        image_key("tenant", "ab" * 32, 20, 10),
    }
    assert key not in others
    assert len(others) == 3
    root = root_key("r")
    names = {
        block_hash(root, [5, 5], [(key, 0)]),
        block_hash(root, [5, 5], [(key, 2)]),
        block_hash(root, [5, 5], [(key, -1)]),
        block_hash(root, [5, 5], []),
        block_hash(root_key("s"), [5, 5], []),
    }
    assert len(names) == 5
    assert root_key("ab", "c") != root_key("a", "bc")


class Pool(RuleBasedStateMachine):
    """Random holders against a model that remembers what each block holds."""

    @initialize(count=st.integers(2, 8))
    def begin(self, count: int) -> None:
        self.pool = BlockPool(count)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what was written to a block last

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        available = self.pool.available
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > available)
        if blocks is not None:
            held = {block for holder in self.holders for block in holder}
            assert not held & set(blocks), "a block that is held was given away"
            for block in blocks:
                self.content.pop(block, None)
            self.holders.append(blocks)

    @rule(names=st.lists(st.sampled_from("ab"), max_size=4), data=st.data())
    def register(self, names: list[str], data: st.DataObject) -> None:
        if not self.holders:
            return
        holder = data.draw(st.sampled_from(self.holders))
        for block, name in zip(holder, hashes(*names), strict=False):
            if block in self.content:
                break  # its content stands
            self.content[block] = name
            self.pool.register(block, name)

    @rule(names=st.lists(st.sampled_from("ab"), max_size=4))
    def match(self, names: list[str]) -> None:
        wanted = hashes(*names)
        found = self.pool.match(wanted)
        assert [self.content[block] for block in found] == wanted[: len(found)]
        self.holders.append(found)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.holders:
            at = data.draw(st.integers(0, len(self.holders) - 1))
            self.pool.release(self.holders.pop(at))

    @invariant()
    def nothing_is_lost(self) -> None:
        held = {block for holder in self.holders for block in holder}
        assert self.pool.held == len(held)
        assert self.pool.available + len(held) == self.pool.total


TestPool = Pool.TestCase
