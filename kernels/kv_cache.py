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

SCALES = torch.bfloat16
"""Format of the scales of what is kept in 8 bits."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the largest number of a head becomes in a format of 8 bits."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What is kept of a token: keys and values of so many layers and heads, in this number format."""

    num_layers: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """A format of 8 bits (``LARGEST``) keeps a scale for each token and KV head, too."""
    compute: torch.dtype | None = None
    """In which format what is kept in 8 bits is computed with; where a layout depends on it."""

    @property
    def has_scales(self) -> bool:
        return self.dtype.itemsize == 1


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


def bits(stored: Tensor) -> Tensor:
    """The same memory as bytes where torch does little with the format itself."""
    return stored.view(torch.uint8) if stored.dtype is torch.float8_e4m3fn else stored


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] in 8 bits, and the scales [..., 1] to multiply that with: the specification.

    A scale is rounded upwards, so that the largest number fits; if that is infinite or NaN, so is the scale.
    """
    x = x.float()
    wanted = x.abs().amax(-1, keepdim=True) / LARGEST[dtype]
    rounded = (wanted.view(torch.int32) + 0xFFFF >> 16 << 16).view(torch.float32)
    scale = torch.where(wanted.isnan(), wanted, rounded)
    divided = x / scale
    divided = torch.where(divided.isfinite(), divided, 0.0)
    return (divided.round() if dtype is torch.int8 else divided).to(dtype), scale.to(SCALES)


def as_kept(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What a cache of this format, by default that of x, makes of x [..., head_dim]."""
    numbers, scales = (x, x.new_ones(1)) if dtype is None else quantise(x, dtype)
    return numbers.float() * scales.float()


class DenseKVCache(PagedKVCache):
    """All blocks in one tensor: [layers, 2 (keys, values), num_blocks, block_size * kv_heads * head_dim].

    Scales, where there are any, lie in another one.
    """

    _data: Tensor
    _scales: Tensor
    """[layers, 2, num_blocks, block_size * kv_heads] bfloat16; the last is 0 without scales."""

    @property
    def memory(self) -> Tensor:
        """The tensor; another one after ``restore``."""
        return self._data

    @classmethod
    def block_bytes(cls, shape: CacheShape) -> int:
        of_a_head = shape.head_dim * shape.dtype.itemsize + shape.has_scales * SCALES.itemsize
        return shape.num_layers * 2 * shape.block_size * shape.kv_heads * of_a_head

    @property
    def num_bytes(self) -> int:
        return sum(each.numel() * each.itemsize for each in (self._data, self._scales))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        source, destination = zip(*pairs, strict=True)
        for each in (bits(self._data), self._scales):
            each[:, :, list(destination)] = each[:, :, list(source)]

    def release(self) -> None:
        self._data, self._scales = self._data.new_empty(0), self._scales.new_empty(0)

    def restore(self) -> None:
        shape = self.shape
        heads = shape.block_size * shape.kv_heads
        self._data = self._zeros(heads * shape.head_dim, shape.dtype)
        self._scales = self._zeros(heads * shape.has_scales, SCALES)

    def _zeros(self, width: int, dtype: torch.dtype) -> Tensor:
        """Not garbage: a masked position contributes 0 * value, which must not be NaN."""
        sizes = (self.shape.num_layers, 2, self.num_blocks, width)
        if self.device.type == "cpu":  # blocks that no sequence has had yet take no memory
            return reserved_zeros(sizes, dtype, self.num_blocks * width * dtype.itemsize)
        return torch.zeros(*sizes, dtype=dtype, device=self.device)


class TorchKVCache(DenseKVCache):
    """Tokens as rows [block_size, kv_heads, head_dim]; runs on any device."""

    def copy_cells(self, pairs: Sequence[tuple[int, int]]) -> None:
        source, destination = zip(*pairs, strict=True)
        for each in (bits(self._data), self._scales):
            cells = each.view(len(each), 2, self.num_blocks * self.shape.block_size, -1)
            cells[:, :, list(destination)] = cells[:, :, list(source)]

    def plan(self, batch: RaggedBatch) -> AttentionPlan:
        return _TorchPlan(self._data, self._scales, self.shape, batch)


class _TorchPlan(AttentionPlan):
    """Segment after segment, by the plain formula: the specification."""

    def __init__(self, data: Tensor, scales: Tensor, shape: CacheShape, batch: RaggedBatch) -> None:
        self._shape = shape
        self._blocks = data.view(len(data), 2, -1, shape.block_size, shape.kv_heads, shape.head_dim)
        size = shape.block_size
        self._scales = scales.view(*self._blocks.shape[:-1], -1)  # [..., 1], or [..., 0] without any
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
        for blocks, scales, given in zip(self._blocks[layer], self._scales[layer], (k, v), strict=True):
            parts = [(blocks, given.to(blocks.dtype))]
            if self._shape.has_scales:
                new, scale = quantise(given, blocks.dtype)
                parts = [(blocks, new), (scales, scale)]
            for into, each in parts:
                cells, written = bits(into.flatten(0, 1)), bits(each)
                cells[self._tokens] = written
                if self._mirrored is not None:
                    token, cell = self._mirrored
                    cells[cell] = written[token]

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
        for tokens, blocks, length in self._segments:
            k, v = (self._read(layer, which, blocks, length) for which in (0, 1))
            out[tokens] = reference.attention(q[tokens], k, v, scale, window, softcap, sinks)
        return out

    def _read(self, layer: int, which: int, blocks: Tensor, length: int) -> Tensor:
        """Keys or values [length, kv_heads, head_dim] of a sequence with these blocks."""
        stored = self._blocks[layer, which]
        found = bits(stored)[blocks].view(stored.dtype).flatten(0, 1)[:length]
        if not self._shape.has_scales:
            return found
        return found.float() * self._scales[layer, which][blocks].flatten(0, 1)[:length].float()
