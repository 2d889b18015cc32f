"""RMSNorm, alone and with the residual that is added before it (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.rows import Rows, row_start

WIDEST = 16384
"""Rows are held in registers; wider ones do not fit."""


@triton.jit(do_not_specialize=["count"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    count,
    width,
    eps,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_stride,
    out_inner,
    out_outer_stride,
    out_inner_stride,
    HAS_RESIDUAL: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < count)[:, None] & (column < width)
    start = row_start(row, x_inner, x_outer_stride, x_inner_stride)[:, None]
    wide = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = residual + row.to(tl.int64)[:, None] * residual_stride + column
        total = wide + tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(residual.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)[:, None]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if PLUS_ONE:
        normed = wide * scale * (1.0 + factor)
    else:
        if HAS_RESIDUAL:
            normed = (wide * scale).to(residual.dtype.element_ty).to(tl.float32) * factor
        else:
            normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32) * factor
    place = row_start(row, out_inner, out_outer_stride, out_inner_stride)[:, None] + column
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False, out: Tensor | None = None) -> Tensor:
    """x [..., n] scaled to unit root mean square, times weight [n].

    It rounds where ``ReferenceOps.rms_norm`` does: the scaled row to the format of x, its product with the weight to
    the format that both have in common. With ``plus_one`` it does what Gemma's norm does: the factor is 1 + weight, and
    nothing is rounded before the end, to the format of x.

    Args:
        x: float32, bfloat16 or float16, up to 16384 wide, rows contiguous and in at most two levels (see ``Rows``).
        out: where to, of the shape of x; may be x itself.
    Raises:
        ValueError: rows are wider, or lie in another way.
    """
    if out is None:
        dtype = x.dtype if plus_one else torch.promote_types(weight.dtype, x.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, None, weight, eps, plus_one, out)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool = False, out: Tensor | None = None
) -> Tensor:
    """Adds x [rows, n] to residual [rows, n] in place, rounded to the residual's format; the norm of that.

    Otherwise as ``rms_norm``. ``out`` may be x, but not the residual.
    """
    if x.shape != residual.shape or residual.dim() != 2 or residual.stride(1) != 1:
        raise ValueError(f"a residual of shape {tuple(residual.shape)} for rows of shape {tuple(x.shape)}")
    if out is None:
        dtype = residual.dtype if plus_one else torch.promote_types(weight.dtype, residual.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, residual, weight, eps, plus_one, out)
    return out


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool, out: Tensor) -> None:
    given, result = Rows.of(x), Rows.of(out)
    if given.width > WIDEST or weight.shape != (given.width,) or weight.stride(0) != 1:
        raise ValueError(f"a norm of rows of {given.width} with a weight of shape {tuple(weight.shape)}")
    if not given.count:
        return
    block = triton.next_power_of_2(given.width)
    rows = max(1, 1024 // block)  # of what a row is made depends on its width alone
    rms_norm_kernel[(triton.cdiv(given.count, rows),)](
        x,
        residual,
        weight,
        out,
        given.count,
        given.width,
        eps,
        given.inner,
        given.outer_stride,
        given.inner_stride,
        0 if residual is None else residual.stride(0),
        result.inner,
        result.outer_stride,
        result.inner_stride,
        HAS_RESIDUAL=residual is not None,
        PLUS_ONE=plus_one,
        ROWS=rows,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
    )
