"""A matrix product whose rows have the same bits in any batch, for deterministic serving.

Tiles depend on the matrix alone, and so do the parts that the inner dimension is cut into, whose sums are added in
order. Whether one program computes all parts of a tile or each has one makes no difference to the bits, so that alone
depends on how many rows there are: few rows would occupy little of a GPU otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton import launch
from slipstream.kernels.weight import DenseWeight

PROGRAMS = 264
"""Programs that occupy a GPU: two for each multiprocessor of the largest there are."""


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile; those that run at the same time share what they read."""
    in_group = GROUP_M * tiles_n
    first = program // in_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + program % in_group % rows, program % in_group // rows


@triton.jit
def store_tile(total, row, column, bias, out, parts, m, n, out_stride, APART: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums of a tile, with the bias, to ``out`` [m, n]; those of one part only to ``parts`` [parts, m, n]."""
    inside = (row < m)[:, None] & (column < n)[None, :]
    if APART:
        at = (tl.program_id(1).to(tl.int64) * m + row.to(tl.int64)[:, None]) * n + column[None, :]
        tl.store(parts + at, total, mask=inside)
    else:
        if HAS_BIAS:
            total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        at = row.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m"])
def linear_kernel(
    x,
    weight,
    bias,
    out,
    parts,
    m,
    n,
    k,
    x_stride,
    weight_stride,
    out_stride,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    at_m, at_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), 8)
    row, column = at_m * BLOCK_M + tl.arange(0, BLOCK_M), at_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    weight_rows = weight + column.to(tl.int64)[None, :] * weight_stride
    first, count = 0, SPLITS
    if APART:
        first, count = tl.program_id(1), 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in range(first, first + count):
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(part * SPLIT, tl.minimum((part + 1) * SPLIT, k), BLOCK_K):
            at = start + inner
            a = tl.load(x_rows + at[None, :], mask=(row < m)[:, None] & (at < k)[None, :], other=0.0)
            b = tl.load(weight_rows + at[:, None], mask=(column < n)[None, :] & (at < k)[:, None], other=0.0)
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
        total += sums
    store_tile(total, row, column, bias, out, parts, m, n, out_stride, APART, HAS_BIAS)


@triton.jit
def add_parts_kernel(
    parts,
    scale,
    bias,
    out,
    n,
    out_stride,
    SPLITS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(SPLITS):
        total += tl.load(
            parts + (part * tl.num_programs(0).to(tl.int64) + row) * n + column, mask=column < n, other=0.0
        )
    if HAS_SCALE:
        total *= tl.load(scale + column, mask=column < n, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=column < n)


@dataclass(frozen=True, slots=True)
class Split:
    """How the inner dimension of a product is cut."""

    size: int
    count: int

    @classmethod
    def of(cls, n: int, k: int, block_n: int, block_k: int) -> Split:
        """For a matrix [n, k]: so many parts that a single row of tiles occupies a GPU, none of them short."""
        wanted = max(1, min(PROGRAMS // triton.cdiv(n, block_n), k // 512, 8))
        size = triton.cdiv(triton.cdiv(k, wanted), block_k) * block_k
        return cls(size, max(1, triton.cdiv(k, size)))

    def apart(self, m: int, n: int, block_m: int, block_n: int) -> bool:
        """Whether each part gets a program of its own: where tiles alone do not occupy a GPU."""
        return self.count > 1 and triton.cdiv(m, block_m) * triton.cdiv(n, block_n) < PROGRAMS

    def programs(
        self, m: int, n: int, block_m: int, block_n: int, device: torch.device
    ) -> tuple[tuple[int, int], Tensor | None]:
        """The grid of a launch, and memory for its parts [count, m, n] float32 if they are computed apart."""
        apart = self.apart(m, n, block_m, block_n)
        parts = torch.empty(self.count, m, n, dtype=torch.float32, device=device) if apart else None
        return (triton.cdiv(m, block_m) * triton.cdiv(n, block_n), self.count if apart else 1), parts


def add_parts(parts: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """Sets out [m, n] to the sum of parts [splits, m, n] float32, in order, times scale [n], plus bias [n]."""
    splits, m, n = parts.shape
    add_parts_kernel[(m, triton.cdiv(n, 1024))](
        *(parts, scale, bias, out, n, out.stride(0)),
        SPLITS=splits,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        BLOCK=1024,
        num_warps=4,
        enable_fp_fusion=False,
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [m, k] times the transpose of weight [n, k], plus bias [n]: [m, n]. A row's bits do not depend on the others.

    Sums are float32, rounded once; float32 operands are multiplied as such, not as TF32.

    Args:
        x, weight: of one of float32, bfloat16, float16, with contiguous rows.
        out: where to, with contiguous rows.
    """
    m, k = x.shape
    n = len(weight)
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if weight.shape[1] != k or x.dtype is not weight.dtype or {x.stride(1), weight.stride(1), out.stride(1)} != {1}:
        raise ValueError(
            f"the product of {tuple(x.shape)} {x.dtype} with the transpose of {tuple(weight.shape)} {weight.dtype}, "
            "or their rows are not contiguous"
        )
    if not m:
        return out
    exact = x.dtype is torch.float32
    block_m, block_k = (32, 32) if exact else (64, 64)
    block_n = 32 if exact else 128 if n >= 8192 else 64
    split = Split.of(n, k, block_n, block_k)
    grid, parts = split.programs(m, n, block_m, block_n, x.device)
    linear_kernel[grid](
        *(x, weight, bias, out, parts, m, n, k, x.stride(0), weight.stride(0), out.stride(0)),
        SPLIT=split.size,
        SPLITS=split.count,
        APART=parts is not None,
        HAS_BIAS=bias is not None,
        PRECISION="ieee",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        # AMD's programs have a third of the shared memory.
        num_stages=2 if exact or not launch.capability(x.device) else 4,
    )
    if parts is not None:
        add_parts(parts, None, bias, out)
    return out


class InvariantWeight(DenseWeight):
    """A matrix whose product has the same bits for a row in any batch, which cuBLAS's has not."""

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x.to(self._matrix.dtype), self._matrix, self._bias)
