"""Low-rank additions to linear layers, chosen by row.

LoRA (arXiv 2106.09685, section 4.1): ``y = W x + (alpha / r) B A x``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import nn
from torch.nn.functional import linear

_SERIALS = count(1)


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one linear layer: ``x @ down.T @ up.T + bias``."""

    down: torch.Tensor
    """``(rank, in_features)``."""
    up: torch.Tensor
    """``(out_features, rank)``, times the adapter's scaling."""
    bias: torch.Tensor | None = None
    """``(out_features,)``, times the adapter's scaling."""

    @property
    def nbytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.down.nbytes + self.up.nbytes + bias


@dataclass(eq=False, slots=True)
class Adapter:
    """One loaded version of an adapter; it never changes."""

    name: str
    digest: str
    """Of its content: two versions under one name differ in it."""
    layers: Mapping[str, LowRank]
    """By the path of the linear layer in the model."""
    stamp: object = None
    """What its files looked like when they were read."""
    serial: int = field(default_factory=lambda: next(_SERIALS))
    """Rows of a step are sorted by it; 0 is no adapter."""
    installed: bool = False
    """Whether all its layers are `LoraLinear` ones."""
    users: int = 0
    """Requests that hold it."""
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(layer.nbytes for layer in self.layers.values())


class Routing:
    """Which rows of a forward pass belong to which adapter. Used by the model's thread only."""

    def __init__(self) -> None:
        self.rows: list[tuple[Adapter, slice]] = []

    @contextmanager
    def of(self, rows: Iterable[tuple[Adapter | None, int]]) -> Iterator[None]:
        """Inside, the rows of each layer's input are these.

        :param rows: adapter and number of rows, from the first row to the last; neighbours with
            the same adapter are computed together.
        """
        self.rows = _slices(rows)
        try:
            yield
        finally:
            self.rows = []


def _slices(rows: Iterable[tuple[Adapter | None, int]]) -> list[tuple[Adapter, slice]]:
    slices: list[tuple[Adapter, slice]] = []
    row = 0
    for adapter, number in rows:
        end = row + number
        if adapter is not None:
            start = row
            if slices and slices[-1][0] is adapter and slices[-1][1].stop == row:
                start = slices.pop()[1].start
            slices.append((adapter, slice(start, end)))
        row = end
    return slices


class LoraLinear(nn.Linear):
    """An `nn.Linear` with the very weights of another, to which adapters add.

    Rows without an adapter get exactly what the other layer would give them.
    """

    def __init__(self, base: nn.Linear, path: str, routing: Routing) -> None:
        """
        :param path: the layer's name among `Adapter.layers`.
        """
        nn.Module.__init__(self)  # nn.Linear's own would allocate weights
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self._path = path
        self._routing = routing
        self.train(base.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., T, in_features)`` to ``(..., T, out_features)``; T rows as `Routing` says."""
        y = linear(x, self.weight, self.bias)
        for adapter, rows in self._routing.rows:
            added = adapter.layers.get(self._path)
            if added is not None:
                down = linear(x[..., rows, :], added.down)
                y[..., rows, :] += linear(down, added.up, added.bias)
        return y
