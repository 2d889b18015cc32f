"""Rows of a tensor: how kernels address them, and picking some (embeddings, the hidden states to sample from)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_LEVEL = 1 << 30
"""Rows of the inner level where there is no outer one: the same for any number of rows, since kernels are compiled for
what such numbers are divisible by."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor [..., width] as rows that are contiguous themselves, in two levels of regular distance.

    So the heads of queries within fused projections [tokens, heads, head_dim] are rows without a copy.
    """

    tensor: Tensor  # its first element is the first row's
    count: int
    inner: int  # rows of the inner level, or ``ONE_LEVEL``
    outer_stride: int  # elements from a row to the one ``inner`` rows on; 0 where there is none
    inner_stride: int
    width: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """Raises ValueError if x is not such a tensor."""
        width = x.shape[-1]
        if x.stride(-1) != 1:
            raise ValueError(f"the elements of a row are to be contiguous; the last stride is {x.stride(-1)}")
        count, levels = 1, [(1, 0)]
        for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            count *= size
            if size == 1:
                continue
            inside, distance = levels[-1]
            if inside == 1:
                levels[-1] = (size, stride)
            elif stride == inside * distance:
                levels[-1] = (inside * size, distance)
            else:
                levels.append((size, stride))
        if len(levels) > 2:
            raise ValueError(f"rows lie in more than two levels: shape {tuple(x.shape)}, strides {x.stride()}")
        inner, inner_stride = levels[0]
        if len(levels) == 1:
            return cls(x, count, ONE_LEVEL, 0, inner_stride, width)
        return cls(x, count, inner, levels[1][1], inner_stride, width)


def fits(*tensors: Tensor) -> bool:
    """Whether all of them can be addressed as rows."""
    try:
        for tensor in tensors:
            Rows.of(tensor)
    except ValueError:
        return False
    return True


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Where a row of ``Rows`` begins, in elements."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit(do_not_specialize=["source_rows"])
def take_rows_kernel(source, index, out, width, source_rows, source_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + row).to(tl.int64)
    wanted = (at >= 0) & (at < source_rows)
    values = tl.load(source + at * source_stride + column, mask=(column < width) & wanted, other=0.0)
    where = out + row.to(tl.int64) * out_stride + column
    tl.store(where, values.to(tl.float32).to(out.dtype.element_ty), mask=column < width)


def take_rows(source: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of source [rows, width] by index [n] of int32 or int64: [n, width]; zeros where there is no such row.

    So an index of -1 stands for no row. ``out`` may have another number format; by default it has the source's.
    """
    rows, width = source.shape
    if out is None:
        out = torch.empty((*index.shape, width), dtype=source.dtype, device=source.device)
    if source.stride(1) != 1 or out.stride(-1) != 1 or out.dim() != 2 or index.dim() != 1:
        raise ValueError("rows are picked from a matrix with contiguous rows to one, by a list of indices")
    if len(index):
        block = min(triton.next_power_of_2(width), 2048)
        grid = (len(index), triton.cdiv(width, block))
        take_rows_kernel[grid](
            source, index, out, width, rows, source.stride(0), out.stride(0), BLOCK=block, num_warps=4
        )
    return out
