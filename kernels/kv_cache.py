"""The paged KV cache and the attention over it: the two belong together, since a layout is made for its kernel.

A block holds ``block_size`` consecutive tokens of one sequence for every layer. How a token lies within its block, and
in which numbers, is the backend's choice; everybody else names blocks, and single tokens as cells: block * block_size +
offset.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.kernels import reference
from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.memory import reserved_zeros


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What is kept of a token: keys and values of so many layers and heads, in this number format."""

    num_layers: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class AttentionPlan(ABC):
    """One batch over one cache: what layers share of a forward pass is worked out once, and lies on the device."""

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes k, v [num_tokens, kv_heads, head_dim] of the batch's tokens, at their mirrors too."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        q: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of q [num_tokens, heads, head_dim] over the stored sequences; shape and dtype of q.

        ``window``, ``softcap`` and ``sinks`` as in ``reference.attention``.
        """


class PagedKVCache(ABC):
    """Blocks of keys and values on one device. Between ``release`` and ``restore`` there are none."""

    def __init__(self, shape: CacheShape, num_blocks: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.device = device
        self.restore()

    @classmethod
    @abstractmethod
    def block_bytes(cls, shape: CacheShape) -> int:
        """What one block takes."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory it takes now."""

    @abstractmethod
    def plan(self, batch: RaggedBatch) -> AttentionPlan:
        """Once per forward pass; valid while the batch and the cache's memory live."""

    @abstractmethod
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks, (source, destination) each, in every layer."""

    @abstractmethod
    def copy_cells(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies single tokens, (source, destination) each, in every layer."""

    @property
    def is_recordable(self) -> bool:
        """Whether steps need nothing of the host but what lies on the device when they begin."""
        return False

    @abstractmethod
    def release(self) -> None:
        """Gives the memory back; what was stored is lost."""

    @abstractmethod
    def restore(self) -> None:
        """Takes memory again after ``release``, for as many blocks, with nothing in it."""


class DenseKVCache(PagedKVCache):
    """All blocks in one tensor: [layers, 2 (keys, values), num_blocks, block_size * kv_heads * head_dim]."""

    _data: Tensor

    @property
    def memory(self) -> Tensor:
        """The tensor; another one after ``restore``."""
        return self._data

    @classmethod
    def block_bytes(cls, shape: CacheShape) -> int:
        return shape.num_layers * 2 * shape.block_size * shape.kv_heads * shape.head_dim * shape.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self._data.numel() * self._data.itemsize

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        source, destination = zip(*pairs, strict=True)
        self._data[:, :, list(destination)] = self._data[:, :, list(source)]

    def release(self) -> None:
        self._data = self._data.new_empty(0)

    def restore(self) -> None:
        shape = self.shape
        width = shape.block_size * shape.kv_heads * shape.head_dim
        # Zeros, not garbage: a masked position contributes 0 * value, which must not be NaN.
        sizes = (shape.num_layers, 2, self.num_blocks, width)
        if self.device.type == "cpu":  # blocks that no sequence has had yet take no memory
            self._data = reserved_zeros(sizes, shape.dtype, self.num_blocks * width * shape.dtype.itemsize)
        else:
            self._data = torch.zeros(*sizes, dtype=shape.dtype, device=self.device)


class TorchKVCache(DenseKVCache):
    """Tokens as rows [block_size, kv_heads, head_dim]; runs on any device."""

    def copy_cells(self, pairs: Sequence[tuple[int, int]]) -> None:
        source, destination = zip(*pairs, strict=True)
        cells = self._data.view(len(self._data), 2, -1, self.shape.kv_heads * self.shape.head_dim)
        cells[:, :, list(destination)] = cells[:, :, list(source)]

    def plan(self, batch: RaggedBatch) -> AttentionPlan:
        return _TorchPlan(self._data, self.shape, batch)


class _TorchPlan(AttentionPlan):
    """Segment after segment, by the plain formula: the specification."""

    def __init__(self, data: Tensor, shape: CacheShape, batch: RaggedBatch) -> None:
        self._shape = shape
        self._blocks = data.view(len(data), 2, -1, shape.block_size, shape.kv_heads, shape.head_dim)
        self._cells = data.view(len(data), 2, -1, shape.kv_heads, shape.head_dim)
        size = shape.block_size
        row = batch.table_row.repeat(batch.q_start[1:] - batch.q_start[:-1])
        block = batch.block_tables[row, batch.positions // size]
        cells = block.astype("int64") * size + batch.positions % size
        self._tokens = torch.from_numpy(cells).to(data.device)
        """Cell of each token of the batch."""
        self._mirrored: tuple[Tensor, Tensor] | None = None
        """Tokens of the batch, and cells where they are stored too."""
        if len(batch.mirrors):
            token, block, offset = torch.from_numpy(batch.mirrors).to(data.device, torch.long).T
            self._mirrored = token, block * size + offset
        self._segments: list[tuple[slice, Tensor, int]] = []
        """Tokens, blocks of the sequence, and its length."""
        for segment in range(batch.num_segments):
            begin, end = int(batch.q_start[segment]), int(batch.q_start[segment + 1])
            length = int(batch.kv_len[segment])
            table = batch.block_tables[batch.table_row[segment], : -(-length // size)]
            index = torch.from_numpy(table).to(data.device, torch.long)
            self._segments.append((slice(begin, end), index, length))

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        for cells, new in zip(self._cells[layer], (k, v), strict=True):
            new = new.to(cells.dtype)
            cells[self._tokens] = new
            if self._mirrored is not None:
                token, cell = self._mirrored
                cells[cell] = new[token]

    def attend(
        self,
        layer: int,
        q: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty_like(q)
        keys, values = self._blocks[layer]
        for tokens, blocks, length in self._segments:
            k, v = keys[blocks].flatten(0, 1)[:length], values[blocks].flatten(0, 1)[:length]
            out[tokens] = reference.attention(q[tokens], k, v, scale, window, softcap, sinks)
        return out
