"""Products with matrices of 8 or 4 bits a number: a step that reads weights more than it computes gets shorter by that.

Weights are unpacked to what they stand for without a scale, which activations are multiplied with exactly, and sums in
float32 are scaled: so nothing is rounded between the stored number and the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.linear import Split, add_parts, store_tile, tile_of

Format = Literal["int8", "fp8", "int4"]
LARGEST_FP8 = 448.0
GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A matrix [n, k] in few bits.

    "int8" and "fp8" (e4m3): a byte per number and a scale per row. "int4": a scale and a zero per row and group of
    numbers; a number is (stored - zero) * scale. Of two groups the first is in the low bits of bytes, the second in the
    high ones; rows are filled up to whole pairs of groups with numbers that stand for 0.
    """

    format: Format
    k: int
    data: Tensor  # [n, k] int8 or uint8; int4: [n, pairs of groups * group] uint8
    scale: Tensor  # [n] float32; int4: [n, groups] bfloat16
    zero: Tensor | None = None  # int4: [n, groups] uint8
    group: int = 0

    @property
    def n(self) -> int:
        return len(self.data)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)


def pack_int8(weight: Tensor) -> QuantizedMatrix:
    """weight [n, k] as integers from -127 to 127 and a scale per row."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp(min=1e-30) / 127
    return QuantizedMatrix("int8", weight.shape[1], (wide / scale[:, None]).round().to(torch.int8), scale)


def pack_fp8(weight: Tensor, per_tensor: bool = False) -> QuantizedMatrix:
    """weight [n, k] as float8 e4m3, with a scale per row, or the same one for all rows."""
    wide = weight.float()
    largest = wide.abs().amax().expand(len(wide)) if per_tensor else wide.abs().amax(1)
    scale = (largest.clamp(min=1e-30) / LARGEST_FP8).contiguous()
    stored = (wide / scale[:, None]).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return QuantizedMatrix("fp8", weight.shape[1], stored.view(torch.uint8), scale)


def pack_int4(weight: Tensor, group: int = 128) -> QuantizedMatrix:
    """weight [n, k] as integers from 0 to 15, with a scale and a zero per row and group of 32, 64 or 128 numbers."""
    if group not in GROUPS:
        raise ValueError(f"groups of {group} numbers; there are {GROUPS}")
    n, k = weight.shape
    pairs = triton.cdiv(k, 2 * group)
    wide = torch.nn.functional.pad(weight.float(), (0, pairs * 2 * group - k)).view(n, pairs * 2, group)
    lowest, highest = wide.amin(2).clamp(max=0), wide.amax(2).clamp(min=0)
    scale = ((highest - lowest) / 15).clamp(min=1e-30).bfloat16()
    zero = (-lowest / scale.float()).round().clamp(0, 15)
    stored = ((wide / scale.float()[:, :, None]).round() + zero[:, :, None]).clamp(0, 15).to(torch.uint8)
    low, high = stored.view(n, pairs, 2, group).unbind(2)
    return QuantizedMatrix("int4", k, (low | high << 4).reshape(n, -1), scale, zero.to(torch.uint8), group)


def unpack(matrix: QuantizedMatrix) -> Tensor:
    """The numbers [n, k] float32 that it stands for; the reference."""
    if matrix.format == "int8":
        return matrix.data.float() * matrix.scale[:, None]
    if matrix.format == "fp8":
        return matrix.data.view(torch.float8_e4m3fn).float() * matrix.scale[:, None]
    assert matrix.zero is not None
    pairs = matrix.data.view(matrix.n, -1, matrix.group)
    stored = torch.stack((pairs & 15, pairs >> 4), dim=2).view(matrix.n, -1, matrix.group).float()
    numbers = (stored - matrix.zero.float()[:, :, None]) * matrix.scale.float()[:, :, None]
    return numbers.reshape(matrix.n, -1)[:, : matrix.k]


@triton.jit
def unpacked(stored, FP8: tl.constexpr):
    """What a byte stands for, as float32; e4m3 by its bits, as not every GPU knows it."""
    if FP8:
        bits = stored.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # a float16, whose exponent says 2^8 less
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        return stored.to(tl.float32)


@triton.jit(do_not_specialize=["m"])
def quantized_linear_kernel(
    x,
    data,
    scale,
    zero,
    bias,
    out,
    parts,
    m,
    n,
    k,
    x_stride,
    data_stride,
    scale_stride,
    out_stride,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    at_m, at_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), 8)
    row, column = at_m * BLOCK_M + tl.arange(0, BLOCK_M), at_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    is_row, is_column = (row < m)[:, None], (column < n)[None, :]
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    data_rows = data + column.to(tl.int64)[None, :] * data_stride
    scale_rows = column.to(tl.int64) * scale_stride
    dtype = x.dtype.element_ty
    first, count = 0, SPLITS
    if APART:
        first, count = tl.program_id(1), 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in range(first, first + count):
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        end = tl.minimum((part + 1) * SPLIT, k)
        if GROUP:
            # GROUP bytes hold two groups, one in their low and one in their high bits.
            for start in range(part * SPLIT // 2, tl.cdiv(end, 2 * GROUP) * GROUP, BLOCK_K):
                both = tl.load(data_rows + (start + inner)[:, None], mask=is_column, other=0)
                for half in tl.static_range(2):
                    group_of_row = start // GROUP * 2 + half
                    at = group_of_row * GROUP + start % GROUP + inner
                    a = tl.load(x_rows + at[None, :], mask=is_row & (at < k)[None, :], other=0.0)
                    group = scale_rows + group_of_row
                    zeros = tl.load(zero + group, mask=column < n, other=0).to(tl.float32)
                    scales = tl.load(scale + group, mask=column < n, other=0.0).to(tl.float32)
                    stored = ((both >> (4 * half)) & 15).to(tl.float32)
                    b = (stored - zeros[None, :]).to(dtype)
                    sums += tl.dot(a, b, input_precision="ieee") * scales[None, :]
        else:
            for start in range(part * SPLIT, end, BLOCK_K):
                at = start + inner
                a = tl.load(x_rows + at[None, :], mask=is_row & (at < k)[None, :], other=0.0)
                stored = tl.load(data_rows + at[:, None], mask=is_column & (at < k)[:, None], other=0)
                sums = tl.dot(a, unpacked(stored, FP8).to(dtype), sums, input_precision="ieee")
        total += sums
    if not APART and not GROUP:
        total *= tl.load(scale + column, mask=column < n, other=0.0)[None, :]
    store_tile(total, row, column, bias, out, parts, m, n, out_stride, APART, HAS_BIAS)


def quantized_linear(
    x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None = None, out: Tensor | None = None, tile_rows: int = 0
) -> Tensor:
    """x [m, k] times the transpose of a matrix [n, k] in few bits, plus bias [n]: [m, n].

    Args:
        x: bfloat16, float16 or float32, with contiguous rows.
        out: where to, with contiguous rows; of the format of x by default.
        tile_rows: rows of a tile, 16 or 64; 0 for 16 where there are no more rows than that. With one of them a row's
            bits do not depend on the others; between them they may differ on Hopper, as instructions do. It is 16 for
            float32, whatever is asked for.
    """
    m, k = x.shape
    n = matrix.n
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if matrix.k != k or {x.stride(1), out.stride(1)} != {1} or tile_rows not in (0, 16, 64):
        raise ValueError(f"the product of {tuple(x.shape)} with the transpose of {(n, matrix.k)}, {tile_rows=}")
    if not m:
        return out
    is_int4 = matrix.format == "int4"
    block_m = tile_rows or (16 if m <= 16 else 64)
    block_n = block_k = 64
    if x.dtype is torch.float32:
        block_m, block_n, block_k = 16, 32, 16 if is_int4 else 32
    if is_int4:
        block_k = min(block_k, matrix.group)
    split = Split.of(n, k, block_n, 2 * matrix.group if is_int4 else block_k)
    grid, parts = split.programs(m, n, block_m, block_n, x.device)
    quantized_linear_kernel[grid](
        *(x, matrix.data, matrix.scale, matrix.zero, bias, out, parts, m, n, k),
        *(x.stride(0), matrix.data.stride(0), matrix.scale.stride(0), out.stride(0)),
        SPLIT=split.size,
        SPLITS=split.count,
        APART=parts is not None,
        HAS_BIAS=bias is not None,
        GROUP=matrix.group,
        FP8=matrix.format == "fp8",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if is_int4 and block_m == 64 else 4,
        num_stages=2 if x.dtype is torch.float32 else 3,
        enable_fp_fusion=False,  # so that parts computed apart give the same bits
    )
    if parts is not None:
        add_parts(parts, None if is_int4 else matrix.scale, bias, out)
    return out
