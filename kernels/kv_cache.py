"""The paged KV cache: one tensor of blocks, and the attention over it.

A block holds ``block_size`` consecutive tokens of one sequence for every layer. How a token lies within its block is
the backend's choice; everybody else only names blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.kernels import reference
from slipstream.kernels.batch import RaggedBatch


class PagedKVCache(ABC):
    """``data`` is [layers, 2 (keys, values), num_blocks, block_size * kv_heads * head_dim], zero at the start."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        # Zeros, not garbage: a masked position contributes 0 * value, which must not be NaN.
        self.data = torch.zeros(num_layers, 2, num_blocks, block_size * kv_heads * head_dim, dtype=dtype, device=device)

    @staticmethod
    def block_bytes(num_layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * 2 * block_size * kv_heads * head_dim * dtype.itemsize

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks, (source, destination) each, in every layer."""
        source, destination = zip(*pairs, strict=True)
        self.data[:, :, list(destination)] = self.data[:, :, list(source)]

    @abstractmethod
    def copy_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies single tokens, (source, destination) each as block * block_size + offset, in every layer."""

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor, batch: RaggedBatch) -> None:
        """Writes k, v [num_tokens, kv_heads, head_dim] of the batch's tokens, at their mirrors too."""

    @abstractmethod
    def attend(
        self, layer: int, q: Tensor, batch: RaggedBatch, scale: float, window: int = 0, softcap: float = 0.0
    ) -> Tensor:
        """Causal attention of q [num_tokens, heads, head_dim] over the stored sequences; shape and dtype of q."""


class TorchKVCache(PagedKVCache):
    """Tokens as rows [block_size, kv_heads, head_dim]; runs on any device. The specification."""

    def copy_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        source, destination = zip(*pairs, strict=True)
        rows = self.data.view(len(self.data), 2, -1, self.kv_heads * self.head_dim)
        rows[:, :, list(destination)] = rows[:, :, list(source)]

    def store(self, layer: int, k: Tensor, v: Tensor, batch: RaggedBatch) -> None:
        slots = self._slots(batch)
        rows = self.data[layer].view(2, -1, self.kv_heads, self.head_dim)
        rows[0, slots] = k.to(rows.dtype)
        rows[1, slots] = v.to(rows.dtype)
        if len(batch.mirrors):
            row, block, offset = torch.from_numpy(batch.mirrors).to(self.data.device, torch.long).T
            rows[0, block * self.block_size + offset] = k[row].to(rows.dtype)
            rows[1, block * self.block_size + offset] = v[row].to(rows.dtype)

    def attend(
        self,
        layer: int,
        q: Tensor,
        batch: RaggedBatch,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty_like(q)
        blocks = self.data[layer].view(2, self.num_blocks, self.block_size, self.kv_heads, self.head_dim)
        for segment in range(batch.num_segments):
            begin, end = int(batch.q_start[segment]), int(batch.q_start[segment + 1])
            length = int(batch.kv_len[segment])
            table = batch.block_tables[batch.table_row[segment], : -(-length // self.block_size)]
            index = torch.from_numpy(table).to(self.data.device, torch.long)
            k = blocks[0, index].flatten(0, 1)[:length]
            v = blocks[1, index].flatten(0, 1)[:length]
            out[begin:end] = reference.attention(q[begin:end], k, v, scale, window, softcap, sinks)
        return out

    def _slots(self, batch: RaggedBatch) -> Tensor:
        """Index of each token of the batch among all token rows of the cache."""
        row = batch.table_row.repeat(batch.q_start[1:] - batch.q_start[:-1])
        block = batch.block_tables[row, batch.positions // self.block_size]
        slots = block.astype("int64") * self.block_size + batch.positions % self.block_size
        return torch.from_numpy(slots).to(self.data.device)
