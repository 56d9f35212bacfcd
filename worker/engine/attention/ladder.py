"""Which kernels attend: the fastest that the model, the device and the installed libraries allow.

::

    decode     xformers' paged triton_splitk  ->  SDPA over gathered blocks
    prompts    FlashAttention-2 in torch      ->  SDPA, one sequence after the other

A kernel is taken if it gives, on this very device, what SDPA gives: libraries that import well may
still refuse a GPU, or be wrong on it. What is not taken is said in the log, once.
"""

from __future__ import annotations

import logging
from typing import Final

import torch

from worker.engine.attention import flash, sdpa, splitk
from worker.engine.attention.cache import KVCache
from worker.engine.attention.context import Decodes, Kernels, Prefills, StepContext

logger = logging.getLogger(__name__)

MOST_ERROR: Final = 2e-2
"""Norm of the difference to SDPA in float32 over the norm of it: five times what bf16 gives."""


def choose(cache: KVCache, heads: int) -> Kernels:
    """The kernels for a decoder with this cache. Its blocks 0, 1 and the last one are
    written to, and cleared.

    :param heads: of queries.
    """
    rows = cache.rows
    head_dim, dtype, device = rows.shape[2], rows.dtype, rows.device
    kernels = sdpa.KERNELS
    if device.type != "cuda":
        return kernels
    if splitk.supports(head_dim, cache.block_size, dtype, device):
        paged = Kernels("xformers", splitk.decode, kernels.prefill)
        kernels = _proven(paged, kernels, cache, heads)
    else:
        _refuse("xformers' paged attention", f"no kernel for {dtype} and heads of {head_dim}")
    if flash.supports(head_dim, dtype, device):
        fast = Kernels(f"{kernels.name}+flash", kernels.decode, flash.prefill)
        kernels = _proven(fast, kernels, cache, heads)
    else:
        _refuse("FlashAttention-2", f"no kernel for {dtype} and heads of {head_dim}")
    logger.info("attention runs on %s", kernels.name)
    return kernels


def _proven(kernels: Kernels, otherwise: Kernels, cache: KVCache, heads: int) -> Kernels:
    try:
        error = difference(kernels, cache, heads)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise  # the kernel is not at fault
    except Exception as problem:  # noqa: BLE001  (a stranger's code: a missing library, a compiler)
        _refuse(kernels.name, repr(problem))
        return otherwise
    if error < MOST_ERROR:
        return kernels
    _refuse(kernels.name, f"it differs from SDPA by {error:.1e}")
    return otherwise


def _refuse(what: str, why: str) -> None:
    logger.warning("attention cannot run on %s: %s", what, why)


@torch.inference_mode()
def difference(kernels: Kernels, cache: KVCache, heads: int) -> float:
    """Relative error of `kernels` against SDPA in float32: two sequences that decode, two prompts,
    one of them with a context. In the first blocks of `cache` and in its last one, where an address
    that was computed too narrowly would be wrong."""
    shape, device = cache.rows.shape, cache.rows.device
    kv_heads, head_dim = shape[1:]
    size = cache.block_size
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(
            (rows, columns, head_dim), generator=generator, device=device, dtype=torch.float32
        ).to(cache.rows.dtype)

    last = cache.blocks - 1
    table = [last, 1 if last > 1 else last]
    lengths = [size // 2 + 1, size] if table[0] == table[1] else [2 * size - 3, size // 2 + 1]
    layers = (0, cache.layers - 1)
    tables = torch.tensor([table, [table[0], 0]], device=device, dtype=torch.int32)
    context = lengths[0]
    spans = [(0, 7, 7), (7, 7 + 5, context)]
    in_last = (
        torch.tensor(table, device=device)[:, None] * cache.rows_per_block
        + torch.arange(size, device=device)
    ).flatten()[:context]
    new = random(12, kv_heads), random(12, kv_heads)
    queries = random(12, heads)
    errors: list[float] = []
    for layer in layers:
        keys, values = cache.layer_rows(layer)
        keys[in_last], values[in_last] = random(context, kv_heads), random(context, kv_heads)
        keys[in_last[-5:]], values[in_last[-5:]] = new[0][7:], new[1][7:]
        decodes = Decodes(
            tables * cache.pages_per_block,
            torch.tensor(lengths, device=device, dtype=torch.int32),
        )
        fresh = torch.arange(7, device=device)  # of the padding block: never read as a context
        prefills = Prefills(
            spans,
            torch.cat((fresh, in_last)),
            torch.tensor([0, 7, 12], device=device, dtype=torch.int32),
            torch.tensor([0, 7, 7 + context], device=device, dtype=torch.int32),
        )
        keys[fresh], values[fresh] = new[0][:7], new[1][:7]
        for of in (decodes, prefills):
            results = []
            for each in (kernels, sdpa.KERNELS):
                step = StepContext(cache, each, in_last)
                if isinstance(of, Decodes):
                    step.decodes = Decodes(of.tables, of.lengths)
                    results.append(each.decode(queries[:2], layer, step, head_dim**-0.5))
                else:
                    step.prefills = of
                    results.append(each.prefill(queries, *new, layer, step, head_dim**-0.5))
            ours, reference = (each.float() for each in results)
            errors.append(float((ours - reference).norm() / reference.norm()))
    cache.clear(torch.tensor([0, *table], device=device))
    return max(errors) if all(error == error for error in errors) else float("inf")
