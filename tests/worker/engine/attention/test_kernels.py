"""One contract for all attention kernels, held against attention written out for one token.

On a machine without CUDA only SDPA is there; on one with it, the same tests hold xformers and
FlashAttention to it.
"""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from worker.engine.attention import Decodes, Kernels, KVCache, Prefills, StepContext, sdpa
from worker.engine.attention import choose as choose_kernels
from worker.engine.attention.ladder import difference
from worker.engine.attention.store import store

CUDA = torch.cuda.is_available()
PLACES = [("cpu", torch.float32)] + ([("cuda", torch.bfloat16)] if CUDA else [])
MOST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

SIZE = 64
LAYERS = 3
HEADS, KV_HEADS, DIM = 8, 2, 64
SCALE = 0.11


@pytest.fixture(params=PLACES, ids=[device for device, _ in PLACES])
def cache(request: pytest.FixtureRequest) -> KVCache:
    device, dtype = request.param
    made = KVCache(
        40,
        layers=LAYERS,
        block_size=SIZE,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=dtype,
        device=torch.device(device),
    )
    torch.manual_seed(0)
    made.pool.normal_()
    return made


@pytest.fixture
def all_kernels(cache: KVCache) -> list[Kernels]:
    """Those that run on the device. The choice tries them on some blocks of the cache, which it
    clears: it is filled again."""
    chosen = choose_kernels(cache, HEADS)
    cache.pool.normal_()
    return [sdpa.KERNELS] if chosen is sdpa.KERNELS else [sdpa.KERNELS, chosen]


def random(cache: KVCache, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=cache.rows.device, dtype=cache.rows.dtype)


def context(cache: KVCache, layer: int, blocks: list[int], length: int) -> list[torch.Tensor]:
    """Keys and values of one sequence, ``(length, kv_heads, dim)``, read block by block."""
    return [cache.pool[blocks, layer, kind].flatten(0, 1)[:length].float() for kind in (0, 1)]


def written_out(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``(heads, dim)`` of one query over its ``(length, kv_heads, dim)``."""
    per = HEADS // KV_HEADS
    heads = []
    for head in range(HEADS):
        scores = keys[:, head // per] @ query[head].float() * SCALE
        heads.append(scores.softmax(0) @ values[:, head // per])
    return torch.stack(heads)


def error(made: torch.Tensor, wanted: list[torch.Tensor]) -> float:
    reference = torch.stack(wanted)
    return float((made.float() - reference).norm() / reference.norm())


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(
    "lengths",
    [[1], [63, 64, 65], [200, 1, 130, 64, 128], list(range(1, 38))],
    ids=["one token", "around a block", "ragged", "many"],
)
def test_each_sequence_that_decodes_sees_its_own_tokens_and_no_others(
    cache: KVCache, all_kernels: list[Kernels], layer: int, lengths: list[int]
) -> None:
    order = torch.randperm(39).tolist()
    wide = max(-(-length // SIZE) for length in lengths)
    # (Blocks are shared by some, as prefixes are.)
    tables = [[1 + order[(7 * i + j) % 39] for j in range(wide)] for i in range(len(lengths))]
    query = random(cache, len(lengths), HEADS, DIM)
    device = cache.rows.device
    pages = torch.tensor(tables, dtype=torch.int32, device=device) * cache.pages_per_block
    wanted = [
        written_out(query[i], *context(cache, layer, tables[i], length))
        for i, length in enumerate(lengths)
    ]
    for kernels in all_kernels:
        step = StepContext(cache, kernels, torch.empty(0))
        step.decodes = Decodes(pages, torch.tensor(lengths, dtype=torch.int32, device=device))
        made = kernels.decode(query, layer, step, SCALE)
        assert made.shape == query.shape
        assert error(made, wanted) < MOST_ERROR[query.dtype], kernels.name


def test_a_step_sees_what_was_written_to_its_tables_since_the_one_before(
    cache: KVCache, all_kernels: list[Kernels]
) -> None:
    """CUDA graphs run on the same tensors again and again."""
    device = cache.rows.device
    query = random(cache, 2, HEADS, DIM)
    for kernels in all_kernels:
        decodes = Decodes(
            torch.zeros(2, 3, dtype=torch.int32, device=device),
            torch.ones(2, dtype=torch.int32, device=device),
        )
        for tables, lengths in (
            ([[3, 4, 5], [6, 7, 8]], [190, 70]),
            ([[9, 1, 2], [3, 0, 0]], [66, 9]),
        ):
            decodes.tables.copy_(torch.tensor(tables) * cache.pages_per_block)
            decodes.lengths.copy_(torch.tensor(lengths))
            step = StepContext(cache, kernels, torch.empty(0), decodes=decodes)
            made = kernels.decode(query, 1, step, SCALE)
            wanted = [
                written_out(query[i], *context(cache, 1, tables[i], lengths[i])) for i in (0, 1)
            ]
            assert error(made, wanted) < MOST_ERROR[query.dtype], kernels.name


@pytest.mark.parametrize(
    "spans",
    [[(5, 5)], [(70, 70), (1, 1), (130, 130)], [(3, 100), (64, 64), (1, 65), (66, 200)]],
    ids=["one prompt", "prompts", "after a cached beginning"],
)
def test_each_token_of_a_prompt_sees_those_before_it(
    cache: KVCache, all_kernels: list[Kernels], spans: list[tuple[int, int]]
) -> None:
    layer, device = 1, cache.rows.device
    order = iter(torch.randperm(39).tolist())
    at = 2  # as if two sequences decoded before them
    of_step, rows, wanted = [], [], []
    new = [random(cache, sum(length for length, _ in spans), KV_HEADS, DIM) for _ in range(2)]
    query = random(cache, len(new[0]), HEADS, DIM)
    done = 0
    for length, whole in spans:
        blocks = [1 + next(order) for _ in range(-(-whole // SIZE))]
        places = torch.arange(whole)
        row = torch.tensor(blocks)[places // SIZE] * cache.rows_per_block + places % SIZE
        rows.append(row)
        own = [each[done : done + length] for each in new]
        store(*own, *cache.layer_rows(layer), row[-length:].to(device))
        keys, values = context(cache, layer, blocks, whole)
        for i in range(length):
            seen = whole - length + i + 1
            wanted.append(written_out(query[done + i], keys[:seen], values[:seen]))
        of_step.append((at, at + length, whole))
        at, done = at + length, done + length

    def sums(lengths: list[int]) -> torch.Tensor:
        starts = [0, *itertools.accumulate(lengths)]
        return torch.tensor(starts, dtype=torch.int32, device=device)

    fresh = all(length == whole for length, whole in spans)
    for kernels in all_kernels:
        step = StepContext(cache, kernels, torch.empty(0))
        step.prefills = Prefills(
            of_step,
            None if fresh else torch.cat(rows).to(device),
            sums([length for length, _ in spans]),
            sums([whole for _, whole in spans]),
        )
        made = kernels.prefill(query, *new, layer, step, SCALE)
        assert made.shape == query.shape
        assert error(made, wanted) < MOST_ERROR[query.dtype], kernels.name


def test_keys_and_values_are_stored_in_their_layer_and_nowhere_else(cache: KVCache) -> None:
    before = cache.pool.clone()
    # As queries, keys and values come out of one matrix product: not contiguous.
    fused = random(cache, 5, 2 * KV_HEADS + HEADS, DIM)
    key, value = fused[:, HEADS : HEADS + KV_HEADS], fused[:, HEADS + KV_HEADS :]
    tokens = [(3, 0), (3, 63), (39, 7), (1, 1), (20, 33)]
    rows = torch.tensor([b * cache.rows_per_block + p for b, p in tokens], device=key.device)
    store(key, value, *cache.layer_rows(1), rows)
    for i, (block, place) in enumerate(tokens):
        before[block, 1, 0, place], before[block, 1, 1, place] = key[i], value[i]
    assert torch.equal(cache.pool, before)


def test_a_kernel_that_computes_something_else_is_found(cache: KVCache) -> None:
    def scaled(query: torch.Tensor, layer: int, step: StepContext, scale: float) -> torch.Tensor:
        return sdpa.decode(query, layer, step, 1.5 * scale)

    wrong = Kernels("wrong", scaled, sdpa.prefill)
    assert difference(sdpa.KERNELS, cache, HEADS) == 0
    assert difference(wrong, cache, HEADS) > 0.02


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_on_cuda_xformers_decodes_and_flash_attention_reads_prompts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = KVCache(
        4,
        layers=2,
        block_size=64,
        kv_heads=2,
        head_dim=128,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    with caplog.at_level(logging.WARNING):
        assert choose_kernels(cache, 16).name == "xformers+flash"
    assert not caplog.records
