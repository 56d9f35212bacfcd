"""Blocks of a session survive in the host's memory what the device does not keep."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.worker.engine.asking import ask, finished
from tests.worker.engine.native_engines import assert_nothing_is_held, engine_for
from visq.pixels import PixelBuffer
from visq.types import Message
from worker.engine.attention import KVCache
from worker.engine.blocks import BlockPool
from worker.engine.face import EngineRequest, Finished
from worker.engine.host_tier import HostTier
from worker.engine.native import NativeEngine

BLOCK_BYTES = 2 * 2 * 4 * 1 * 8 * 4


def tier(blocks: int, *, pool_blocks: int = 9) -> tuple[HostTier, BlockPool, KVCache]:
    cache = KVCache(
        pool_blocks,
        layers=2,
        block_size=4,
        kv_heads=1,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.pool.normal_()
    pool = BlockPool(pool_blocks)
    return HostTier(cache, pool, blocks * BLOCK_BYTES), pool, cache


def names(*numbers: int) -> list[bytes]:
    return [bytes([number]) * 16 for number in numbers]


def test_a_block_comes_back_as_it_was() -> None:
    host, pool, cache = tier(4)
    blocks = pool.allocate(3)
    assert blocks is not None
    before = cache.pool[blocks].clone()
    host.keep(names(1, 2, 3), blocks)
    pool.release(blocks)
    cache.pool.zero_()
    found = host.match(names(1, 2, 3, 4))
    assert len(found) == 3
    assert torch.equal(cache.pool[found], before)
    assert pool.match(names(1, 2, 3)) == found, "and is registered on the device again"


def test_only_the_beginning_of_a_prompt_is_found() -> None:
    host, pool, _ = tier(4)
    blocks = pool.allocate(2)
    assert blocks is not None
    host.keep(names(1, 3), blocks)
    assert len(host.match(names(1, 2, 3))) == 1
    assert host.match(names(3, 1)) != host.match(names(2, 1)) == []


def test_what_was_unused_for_longest_goes_first() -> None:
    host, pool, _ = tier(3)
    blocks = pool.allocate(4)
    assert blocks is not None
    host.keep(names(1, 2, 3), blocks[:3])
    pool.release(host.match(names(1)))
    host.keep(names(4), blocks[3:])
    assert host.used == 3
    assert host.match(names(3)) == []
    assert len(host.match(names(1))) == len(host.match(names(4))) == 1


def test_of_a_session_the_end_goes_before_the_beginning() -> None:
    host, pool, _ = tier(6)
    blocks = pool.allocate(8)
    assert blocks is not None
    host.keep(names(1, 2, 3, 4), blocks[:4])
    host.keep(names(11, 12, 13, 14), blocks[4:])
    pool.release(blocks)
    found = host.match(names(1, 2, 3, 4))
    assert len(found) == 2, "without its beginning, nothing else of it would be of use"
    pool.release(found)
    assert len(host.match(names(11, 12, 13, 14))) == 4


def test_no_more_is_copied_back_than_there_are_blocks_for() -> None:
    host, pool, _ = tier(8, pool_blocks=5)
    blocks = pool.allocate(4)
    assert blocks is not None
    host.keep(names(1, 2, 3, 4), blocks)
    pool.release(blocks[2:])
    assert len(host.match(names(1, 2, 3, 4))) == 2
    assert host.match(names(3)) == []


def turn(engine: NativeEngine, *messages: Message, salt: str = "") -> Finished:
    request = EngineRequest(
        id="turn",
        messages=list(messages),
        gen_config=ask(max_new_tokens=8).gen_config,
        goes_on=True,
        cache_salt=salt,
    )
    return finished(engine.submit(request).result())


def flush(engine: NativeEngine, picture: PixelBuffer) -> None:
    """Drive everything that is cached on the device out of it."""
    for number in range(12):
        finished(engine.submit(ask(f"{number}" * 60, max_new_tokens=4)).result())


def test_a_later_turn_finds_its_session_though_the_device_has_forgotten_it(
    internvl: Path, pictures: list[PixelBuffer]
) -> None:
    engine = engine_for(internvl, blocks=24, block_size=8, host_cache_bytes=1 << 20)
    without = engine_for(internvl, blocks=24, block_size=8)
    try:
        opening = Message(role="user", content="Tell me about the things that you have seen here.")
        results: list[Finished] = []
        for each in (engine, without):
            first = turn(each, opening)
            flush(each, pictures[0])
            answer = Message(role="assistant", content=first.text)
            results.append(turn(each, opening, answer, Message(role="user", content="And then?")))
        kept, forgotten = results
        assert kept.token_ids == forgotten.token_ids
        assert kept.cached_tokens > 40 > forgotten.cached_tokens
        assert_nothing_is_held(engine)
    finally:
        engine.close()
        without.close()


def test_another_tenant_finds_nothing_of_it(internvl: Path, pictures: list[PixelBuffer]) -> None:
    engine = engine_for(internvl, blocks=24, block_size=8, host_cache_bytes=1 << 20)
    try:
        opening = Message(role="user", content="Tell me about the things that you have seen here.")
        turn(engine, opening, salt="one")
        flush(engine, pictures[0])
        assert turn(engine, opening, salt="other").cached_tokens == 0
        assert turn(engine, opening, salt="one").cached_tokens > 0
    finally:
        engine.close()
