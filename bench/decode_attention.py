"""In how many parts to split the keys of a decode step: ``python -m bench.decode_attention``.

xformers' paged ``triton_splitk`` over the engine's cache (heads and layers of Qwen2.5-VL-3B), all
36 layers in one CUDA graph, over random blocks of a cache of 19 GB, so that nothing is in the L2
cache. Beside each shape the time in which its keys and values can be read at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import torch

from bench.results_files import RESULTS, Table, conditions, described, write
from worker.engine.attention import Decodes, KVCache, StepContext, sdpa, splitk

LAYERS, HEADS, KV_HEADS, DIM, SIZE = 36, 16, 2, 128, 64
BLOCKS: Final = 8000
SHAPES: Final = ((1, 373), (16, 373), (64, 373), (64, 659), (256, 373), (256, 659), (64, 3500))
"""Sequences, and tokens of each."""
SPLITS: Final = (1, 2, 4, 8, 16)
BYTES_PER_SECOND: Final = 3.0e12
ROUNDS: Final = 6


def microseconds(cache: KVCache, count: int, length: int, split_k: int | None) -> float:
    """Of one layer; ``None``: xformers' own heuristic, warps and stages."""
    from xformers.ops.fmha import triton_splitk

    width = 16 if length <= 16 * SIZE else 64
    device = cache.rows.device
    tables = torch.randint(1, BLOCKS, (count, width), device=device, dtype=torch.int32)
    lengths = torch.full((count,), length, device=device, dtype=torch.int32)
    query = torch.randn(count, HEADS, DIM, device=device, dtype=torch.bfloat16)
    decodes = Decodes(tables * cache.pages_per_block, lengths)
    step = StepContext(cache, sdpa.KERNELS, tables, decodes=decodes)
    ours: Any = splitk._operator
    choose: Any = (lambda _: triton_splitk.FwOp) if split_k is None else (lambda _: ours(split_k))

    def all_layers() -> None:
        for layer in range(LAYERS):
            splitk.decode(query, layer, step, DIM**-0.5)

    splitk._operator = choose
    try:
        all_layers()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_layers()
    finally:
        splitk._operator = ours
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(ROUNDS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * begin.elapsed_time(end) / ROUNDS / LAYERS


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    where = conditions()
    cache = KVCache(
        BLOCKS,
        layers=LAYERS,
        block_size=SIZE,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    cache.pool.normal_()
    rows, values = [], []
    for count, length in SHAPES:
        floor = 1e6 * count * length * 2 * KV_HEADS * DIM * 2 / BYTES_PER_SECOND
        times = {str(each): microseconds(cache, count, length, each) for each in (*SPLITS, None)}
        width = SIZE * (16 if length <= 16 * SIZE else 64)
        chosen = splitk.splits(count * KV_HEADS, width)
        cells = [f"{times[str(each)]:.1f}" + ("*" if each == chosen else "") for each in SPLITS]
        rows.append([f"{count} x {length}", f"{floor:.1f}", *cells, f"{times['None']:.1f}"])
        values.append({"sequences": count, "tokens": length, "floor us": floor, "us": times})
    columns = [
        "sequences x tokens",
        "floor",
        *(f"{each} parts" for each in SPLITS),
        "xformers' own",
    ]
    text = (
        "# Decode attention: in how many parts\n\n"
        f"`python -m bench.decode_attention`: {described(where)} Microseconds a layer on the "
        "device; what the engine chooses (`splitk.splits`) has a star.\n\n"
        + str(Table(columns, rows))
    )
    print(text)
    stored = {"conditions": where, "shapes": values}
    print(write("decode-attention", args.results, text, stored))


if __name__ == "__main__":
    main()
