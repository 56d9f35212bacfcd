"""The Triton kernel of `worker.engine.attention.store`. Imported on CUDA only."""
# ruff: noqa: ANN001, ANN201, N803
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def store_kernel(
    key,
    value,
    keys,
    values,
    rows,
    key_token,
    key_head,
    value_token,
    value_head,
    DIM: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token: ``keys[rows[token]] = key[token]``, and the same of the values.

    ``*_token`` and ``*_head`` are strides in elements; a row has ``ROW`` of them in heads of
    ``DIM``, and ``BLOCK`` is the next power of two.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < ROW
    head, place = at // DIM, at % DIM
    to = tl.load(rows + token) * ROW + at
    new_key = tl.load(key + token * key_token + head * key_head + place, mask=inside)
    new_value = tl.load(value + token * value_token + head * value_head + place, mask=inside)
    tl.store(keys + to, new_key, mask=inside)
    tl.store(values + to, new_value, mask=inside)
