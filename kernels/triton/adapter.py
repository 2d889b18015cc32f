"""Low-rank adapters for rows of a batch, each with its own or none: x A^T first, then B on top of what a matrix gives.

Tokens are taken in tiles of 16, as they lie. A program computes one adapter of its tile after the other, each for the
rows that have it, so that nothing has to be sorted and nothing depends on which adapters a batch has: a graph that was
recorded with some is right with others. Where they lie is data, too, see ``AdapterTable``. A row's bits depend on the
row and its adapter: tiles do not depend on how many rows there are, and parts of sums are added in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.adapter import Adapter, LayerMatrices
from slipstream.kernels.compute import LayerShape
from slipstream.kernels.triton import launch

TILE = 16
"""Rows, and columns of a rank, that are computed together."""
MANY_TOKENS = 64
"""From so many on there are enough tiles to occupy a GPU; of fewer, each adapter of a tile has a program of its own."""
MOST_PARTS, LEAST_PART = 8, 1024
"""Parts that the inner dimension of A is cut into at most, and their size at least."""
LEAST_ADAPTERS = 64
MATRICES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A layer's matrices as ``FusedLayer`` has them, by what their parts are called."""
QKV, OUT, GATE_UP, DOWN = range(len(MATRICES))


@triton.jit
def next_number(numbers, last):
    """The least of them above the last; 2^31 - 1 where there is none."""
    return tl.min(tl.where(numbers > last, numbers, 2147483647), axis=0)


@triton.jit(do_not_specialize=["m", "entry"])
def shrink_kernel(
    x,
    numbers,
    table,
    inner,
    m,
    k,
    entry,
    entries,
    x_stride,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """inner [splits, m, parts, RANK] float32: parts of the sums of x A^T. Programs: tile, lane, (split, part, rank)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    which = tl.program_id(2)
    first = which % (RANK // TILE) * TILE
    part = which // (RANK // TILE) % PARTS
    split = which // (RANK // TILE) // PARTS
    mine = tl.load(numbers + row, mask=row < m, other=0)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    where = ((split.to(tl.int64) * m + row) * PARTS + part) * RANK + first
    end = tl.minimum((split + 1) * SPLIT, k)
    turn = 0
    number = next_number(mine, 0)
    while number < 2147483647:
        at = table + ((number - 1).to(tl.int64) * entries + entry) * 3
        rank = tl.load(at + 2).to(tl.int32)
        if (turn % tl.num_programs(1) == tl.program_id(1)) & (first < rank):
            down = tl.multiple_of(tl.load(at).to(tl.pointer_type(x.dtype.element_ty)), 16)
            columns = down + (part * rank + first + tl.arange(0, TILE)).to(tl.int64)[None, :] * k
            sums = tl.zeros([TILE, TILE], tl.float32)
            for start in range(split * SPLIT, end, BLOCK_K):
                along = start + tl.arange(0, BLOCK_K)
                a = tl.load(x_rows + along[None, :], mask=(mine == number)[:, None] & (along < k)[None, :], other=0.0)
                b = tl.load(columns + along[:, None], mask=(along < k)[:, None], other=0.0)
                sums = tl.dot(a, b, sums, input_precision="ieee")
            tl.store(inner + where[:, None] + tl.arange(0, TILE)[None, :], sums, mask=(mine == number)[:, None])
        number = next_number(mine, number)
        turn += 1


@triton.jit(do_not_specialize=["m", "entry"])
def expand_kernel(
    inner,
    numbers,
    table,
    out,
    m,
    entry,
    entries,
    out_stride,
    width_0,
    width_1,
    width_2,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [m, n], of up to three parts beside each other, plus what their B [n, rank] make of ``inner``.

    Programs: tile, lane, columns; the columns of a program are of one part.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    block = tl.program_id(2)
    ends_0 = tl.cdiv(width_0, BLOCK_N)
    ends_1 = ends_0 + tl.cdiv(width_1, BLOCK_N)
    part = (block >= ends_0).to(tl.int32) + (block >= ends_1).to(tl.int32)
    begin = tl.where(part == 0, 0, tl.where(part == 1, width_0, width_0 + width_1))
    width = tl.where(part == 0, width_0, tl.where(part == 1, width_1, width_2))
    before = tl.where(part == 0, 0, tl.where(part == 1, ends_0, ends_1))
    within = (block - before) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = begin + within
    mine = tl.load(numbers + row, mask=row < m, other=0)
    out_rows = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    along = tl.arange(0, TILE)
    turn = 0
    number = next_number(mine, 0)
    while number < 2147483647:
        at = table + ((number - 1).to(tl.int64) * entries + entry) * 3
        rank = tl.multiple_of(tl.load(at + 2).to(tl.int32), 16)
        if (turn % tl.num_programs(1) == tl.program_id(1)) & (rank > 0):
            up = tl.multiple_of(tl.load(at + 1).to(tl.pointer_type(DTYPE)), 16)
            columns = up + column.to(tl.int64)[None, :] * rank
            is_mine = (mine == number)[:, None]
            total = tl.zeros([TILE, BLOCK_N], tl.float32)
            for first in range(0, rank, TILE):
                sums = tl.zeros([TILE, TILE], tl.float32)
                for split in tl.static_range(SPLITS):
                    where = ((row.to(tl.int64) + split * m.to(tl.int64)) * PARTS + part) * RANK + first
                    sums += tl.load(inner + where[:, None] + along[None, :], mask=is_mine, other=0.0)
                b = tl.load(columns + (first + along)[:, None], mask=(within < width)[None, :], other=0.0)
                total = tl.dot(sums.to(DTYPE), b, total, input_precision="ieee")
            inside = is_mine & (within < width)[None, :]
            given = tl.load(out_rows, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_rows, (given + total).to(out.dtype.element_ty), mask=inside)
        number = next_number(mine, number)
        turn += 1


def add_adapted(
    x: Tensor, numbers: Tensor, table: Tensor, entry: int, rank: int, widths: Sequence[int], out: Tensor
) -> None:
    """Adds to out [m, n] what each row's adapter makes of its row of x [m, k]; in place.

    Args:
        x: of the format of the adapters, with contiguous rows.
        numbers: [m] int32, the adapter of each row: from 1 on, 0 for none.
        table: [adapters, entries, 3] int64: where A [parts, rank, k] and B [n, rank] lie, and the rank: a multiple of
            16, or 0 where the adapter adds nothing here.
        entry: which of the entries it is.
        rank: at least that of every adapter in the table, a multiple of 16.
        widths: columns of the parts of out, which have matrices A of their own; at most 3.
    """
    m, k = x.shape
    if not m:
        return
    parts, exact = len(widths), x.dtype is torch.float32
    block_k, block_n = (64, 32) if exact else (128, 128)
    size = -(-max(LEAST_PART, -(-k // MOST_PARTS)) // block_k) * block_k
    splits = -(-k // size)
    tiles = triton.cdiv(m, TILE)
    lanes = min(m, TILE) if m <= MANY_TOKENS else 1
    inner = torch.empty(splits, m, parts, rank, dtype=torch.float32, device=x.device)
    stages = 2 if exact or not launch.capability(x.device) else 3
    shrink_kernel[(tiles, lanes, splits * parts * rank // TILE)](
        *(x, numbers, table, inner, m, k, entry, table.shape[1], x.stride(0)),
        SPLIT=size,
        PARTS=parts,
        RANK=rank,
        TILE=TILE,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=stages,
    )
    blocks = sum(triton.cdiv(width, block_n) for width in widths)
    expand_kernel[(tiles, lanes, blocks)](
        *(inner, numbers, table, out, m, entry, table.shape[1], out.stride(0), *widths, *[0] * (3 - parts)),
        SPLITS=splits,
        PARTS=parts,
        RANK=rank,
        DTYPE=FORMATS[x.dtype],
        TILE=TILE,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=stages,
        enable_fp_fusion=False,
    )


FORMATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def widths_of(shape: LayerShape) -> tuple[tuple[int, ...], ...]:
    """Columns of the parts of each of ``MATRICES``."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return (q, kv, kv), (shape.hidden,), (shape.intermediate, shape.intermediate), (shape.hidden,)


class TritonAdapter(Adapter):
    """A and B of each matrix of each layer, on the device."""

    def __init__(
        self, shape: LayerShape, layers: Iterable[LayerMatrices], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tensors: list[Tensor] = []
        entries: list[tuple[int, int, int]] = []
        for layer in layers:
            for names, widths in zip(MATRICES, widths_of(shape), strict=True):
                found = [layer.get(name) for name in names]
                given = [pair for pair in found if pair is not None]
                if not given:
                    entries.append((0, 0, 0))
                    continue
                rank = -(-max(len(a) for a, _ in given) // TILE) * TILE
                down = torch.zeros(len(names), rank, given[0][0].shape[1], dtype=dtype, device=device)
                up = torch.zeros(sum(widths), rank, dtype=dtype, device=device)
                for part, (pair, rows) in enumerate(zip(found, up.split(list(widths)), strict=True)):
                    if pair is not None:
                        a, b = pair
                        down[part, : len(a)] = a.to(device, dtype)
                        rows[:, : len(a)] = b.to(device, dtype)
                self._tensors += [down, up]
                entries.append((down.data_ptr(), up.data_ptr(), rank))
        self.entries = np.array(entries, np.int64)
        """[layers * matrices, 3], as in an ``AdapterTable``."""


class AdapterTable:
    """Where kernels find the adapters of a stack, by their numbers."""

    def __init__(self, shape: LayerShape, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        """``dtype``: that of all adapters."""
        self._widths, self._dtype = widths_of(shape), dtype
        self._adapters: Sequence[Adapter | None] = ()
        self.table = torch.zeros(LEAST_ADAPTERS, layers * len(MATRICES), 3, dtype=torch.int64, device=device)
        """[adapters, entries, 3], see ``add_adapted``."""
        self.ranks = (0,) * len(MATRICES)
        """How many columns of ranks there is room for, by matrix of ``MATRICES``: what steps depend on besides data."""

    def use(self, adapters: Sequence[Adapter | None]) -> bool:
        """The first of these is number 1 from now on; whether the table lies where it did."""
        entries = np.zeros((len(adapters), *self.table.shape[1:]), np.int64)
        for number, adapter in enumerate(adapters):
            if adapter is not None:
                assert isinstance(adapter, TritonAdapter)
                entries[number] = adapter.entries
        most = entries[:, :, 2].max(axis=0, initial=0).reshape(-1, len(MATRICES)).max(axis=0, initial=0)
        self.ranks = tuple(triton.next_power_of_2(int(rank)) if rank else 0 for rank in most)
        stays = len(adapters) <= len(self.table)
        if not stays:
            self.table = self.table.new_zeros(triton.next_power_of_2(len(adapters)), *self.table.shape[1:])
        self.table[: len(adapters)] = torch.from_numpy(entries).to(self.table.device)
        self._adapters = adapters  # kept, as the table has addresses only
        return stays

    def add(self, numbers: Tensor, layer: int, matrix: int, x: Tensor, out: Tensor) -> None:
        """Adds to out [m, n], which a layer's matrix made of x [m, k], what the rows' adapters make of it."""
        if rank := self.ranks[matrix]:
            entry = layer * len(MATRICES) + matrix
            add_adapted(x.to(self._dtype), numbers, self.table, entry, rank, self._widths[matrix], out)
