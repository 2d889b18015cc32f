"""Gated activations: silu(gate) * up and gelu(gate) * up (Shazeer 2020)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.rows import ONE_LEVEL, Rows, row_start


@triton.jit
def silu(x):
    """x of float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    """x of float32; the approximation with tanh, for 1 + tanh(u) is 2 / (1 + exp(-2u))."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def gated_kernel(
    gate,
    up,
    out,
    width,
    gate_inner,
    gate_outer_stride,
    gate_inner_stride,
    up_inner,
    up_outer_stride,
    up_inner_stride,
    out_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate + row_start(row, gate_inner, gate_outer_stride, gate_inner_stride) + column
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    activated = gelu_tanh(g) if GELU else silu(g)
    activated = activated.to(gate.dtype.element_ty).to(tl.float32)
    at = up + row_start(row, up_inner, up_outer_stride, up_inner_stride) + column
    product = activated * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * out_stride + column, product.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, elementwise; both [..., n], of one of float32, bfloat16, float16.

    The activation is rounded to the format of the gate, the product to the one that both have in common, as
    ``ReferenceOps.silu_mul`` does.

    Args:
        gate, up: rows contiguous and in at most two levels (see ``Rows``), for example the halves of what one matrix
            makes, [tokens, 2 * n].
        out: where to, [..., n] with contiguous rows at equal distances; may be the gate.
    Raises:
        ValueError: rows lie in another way, or the shapes differ.
    """
    return _gated(gate, up, out, gelu=False)


def gelu_tanh_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up with the approximation by tanh (Hendrycks & Gimpel 2016); otherwise as ``silu_mul``."""
    return _gated(gate, up, out, gelu=True)


def silu_mul_halves(both: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu_mul`` of the first and the second half of the rows of both [..., 2 * n]: [..., n]."""
    gate, up = both.chunk(2, dim=-1)
    return silu_mul(gate, up, out)


def gelu_tanh_mul_halves(both: Tensor, out: Tensor | None = None) -> Tensor:
    """``gelu_tanh_mul`` of the first and the second half of the rows of both [..., 2 * n]: [..., n]."""
    gate, up = both.chunk(2, dim=-1)
    return gelu_tanh_mul(gate, up, out)


def _gated(gate: Tensor, up: Tensor, out: Tensor | None, gelu: bool) -> Tensor:
    if out is None:
        out = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    first, second, result = Rows.of(gate), Rows.of(up), Rows.of(out)
    if gate.shape != up.shape or out.shape != gate.shape or result.inner != ONE_LEVEL:
        raise ValueError(f"a gate of shape {tuple(gate.shape)}, up {tuple(up.shape)}, out {tuple(out.shape)}")
    if not first.count or not first.width:
        return out
    block = min(triton.next_power_of_2(first.width), 1024)
    gated_kernel[(first.count, triton.cdiv(first.width, block))](
        gate,
        up,
        out,
        first.width,
        first.inner,
        first.outer_stride,
        first.inner_stride,
        second.inner,
        second.outer_stride,
        second.inner_stride,
        result.inner_stride,
        GELU=gelu,
        BLOCK=block,
        num_warps=4,
    )
    return out
