"""The memory of the KV cache: one tensor, in blocks of some tokens."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of all layers.

    ``(blocks, layers, 2, block_size, kv_heads, head_dim)``: a block is contiguous over all layers,
    so that it can be moved in one copy. Seen as rows ``(rows, kv_heads, head_dim)``, the keys of a
    token in block b, at place p, lie in row ``(2 * layers * b + 2 * layer) * block_size + p``, and
    its values `block_size` rows further on: for every layer, one page table finds both.
    """

    def __init__(
        self,
        blocks: int,
        *,
        layers: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (blocks, layers, 2, block_size, kv_heads, head_dim)
        # Zeros, since padding is read (and masked): 0 times NaN would be NaN.
        self.pool = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size
        self.blocks = blocks
        self.layers = layers
        self.rows = self.pool.view(-1, kv_heads, head_dim)
        """The same memory as rows."""
        self.pages_per_block = 2 * layers
        self.rows_per_block = self.pages_per_block * block_size
        # From the first keys of a layer to the last values of the last block.
        common = self.rows.shape[0] - (self.pages_per_block - 1) * block_size
        starts = range(0, self.rows_per_block, block_size)
        self._pages = [self.rows[start : start + common] for start in starts]

    def clear(self, blocks: torch.Tensor) -> None:
        """Forget what sequences before have left in `blocks`, ``(n,)`` int64.

        A block that is not full is read whole, and masked: but 0 times their NaN would be NaN.
        """
        self.pool.index_fill_(0, blocks, 0)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, as views ``(blocks, block_size, kv_heads, head_dim)``."""
        return self.pool[:, index, 0], self.pool[:, index, 1]

    def layer_rows(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, as views of rows: both of the same length, and both with the
        token in block b, at place p, in row ``b * rows_per_block + p``."""
        return self._pages[2 * index], self._pages[2 * index + 1]


def bytes_per_block(
    *, layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    return layers * 2 * block_size * kv_heads * head_dim * dtype.itemsize
