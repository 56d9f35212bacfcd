"""Rows of one layer's input, each with its own adapter or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from worker.engine.adapters import Adapter, LoraLinear, LowRank, Routing
from worker.engine.scheduler import Chunk, Step
from worker.engine.sequence import Sequence


def adapter(name: str, path: str = "layer", *, rank: int = 2, bias: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(len(name))
    down, up = torch.randn(rank, 4, generator=generator), torch.randn(3, rank, generator=generator)
    return Adapter(name, name, {path: LowRank(down, up, torch.ones(3) if bias else None)})


def sequence(each: Adapter | None) -> Sequence:
    return Sequence((0, 0, 0), [1, 2], 2, 9, torch.zeros(1, 2), 0, [], b"", each)


@pytest.mark.parametrize("shape", [(1, 6, 4), (6, 4)], ids=["decoder", "head"])
def test_each_row_gets_what_its_adapter_adds(shape: tuple[int, ...]) -> None:
    routing, base, x = Routing(), nn.Linear(4, 3), torch.randn(shape)
    one, two, elsewhere = adapter("one"), adapter("other", rank=3, bias=True), adapter("e", "else")
    layer = LoraLinear(base, "layer", routing)
    with torch.no_grad(), routing.of([(None, 1), (one, 2), (two, 1), (elsewhere, 1), (None, 1)]):
        y, rows, plain = layer(x).view(6, 3), x.view(6, 4), base(x).view(6, 3)
    for row, each in enumerate([None, one, one, two, None, None]):
        added = torch.zeros(3)
        if each is not None:
            low = each.layers["layer"]
            added = rows[row] @ (low.up @ low.down).T
            added = added if low.bias is None else added + low.bias
        torch.testing.assert_close(y[row], plain[row] + added)


def test_rows_without_an_adapter_are_exactly_those_of_the_plain_layer() -> None:
    routing, base, x = Routing(), nn.Linear(4, 3), torch.randn(1, 5, 4)
    layer = LoraLinear(base, "layer", routing)
    with torch.no_grad():
        assert torch.equal(layer(x), base(x))
        with routing.of([(None, 2), (adapter("one"), 3)]):
            assert torch.equal(layer(x)[:, :2], base(x)[:, :2])
        assert torch.equal(layer(x), base(x)), "the routing has ended"


def test_neighbours_with_the_same_adapter_are_one_slice() -> None:
    routing, one, two = Routing(), adapter("one"), adapter("other")
    with routing.of([(one, 2), (one, 3), (None, 1), (one, 1), (two, 1)]):
        assert routing.rows == [(one, slice(0, 5)), (one, slice(6, 7)), (two, slice(7, 8))]
    assert routing.rows == []


def test_a_step_sets_the_chunks_of_an_adapter_side_by_side() -> None:
    one, two = adapter("one"), adapter("other")
    chunks = [Chunk(sequence(each), 0, 1, True) for each in (two, None, one, two, None, one)]
    step = Step(decodes=list(chunks), prefills=list(chunks))
    step.group_adapters()
    expected = [chunks[index] for index in (1, 4, 2, 5, 0, 3)]
    assert (step.decodes, step.prefills) == (expected, expected)
