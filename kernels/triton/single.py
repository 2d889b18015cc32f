"""The product of a single row with a matrix: a stream alone reads all weights for one token, and does nothing else.

Each program has some rows of the matrix, whole. All that it reads of them is asked for before any of it is needed, and
nothing is joined by other programs: cuBLAS cuts the inner dimension of such a product and adds up the parts in a second
launch, which a model has four of in every layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.weight import DenseWeight

ROWS, WIDTH = 8, 512
"""What a program reads at once: rows of the matrix, and numbers of each."""
FORMATS = (torch.bfloat16, torch.float16)


@triton.jit
def single_kernel(
    x,
    weight,
    bias,
    out,
    n,
    k,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, WIDTH)
    rows = weight + row.to(tl.int64)[:, None] * weight_stride
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(0, k, WIDTH, num_stages=4):
        at = start + inner
        a = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
        b = tl.load(rows + at[None, :], mask=(row < n)[:, None] & (at < k)[None, :], other=0.0).to(tl.float32)
        sums = tl.fma(tl.broadcast_to(a[None, :], [ROWS, WIDTH]), b, sums)
    total = tl.sum(sums, axis=1)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < n)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with x [m, k] is one of a single row in a format of 16 bits."""
    return len(x) == 1 and x.dtype is weight.dtype and x.dtype in FORMATS and x.stride(1) == 1


def single(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [1, k] times the transpose of weight [n, k], plus bias [n]: [1, n], summed in float32 and rounded once.

    Args:
        x, weight: both bfloat16 or both float16, with contiguous rows.
    """
    n, k = weight.shape
    if not takes(x, weight) or x.shape[1] != k or weight.stride(1) != 1:
        raise ValueError(
            f"the product of {tuple(x.shape)} {x.dtype} with the transpose of {tuple(weight.shape)} {weight.dtype}, "
            "or their rows are not contiguous"
        )
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    single_kernel[(triton.cdiv(n, ROWS),)](
        *(x, weight, bias, out, n, k, weight.stride(0)),
        HAS_BIAS=bias is not None,
        ROWS=ROWS,
        WIDTH=WIDTH,
        num_warps=4,
    )
    return out


class SingleWeight(DenseWeight):
    """A matrix whose product with a single row is computed here, and with more of them by cuBLAS."""

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._matrix.dtype)
        return single(x, self._matrix, self._bias) if takes(x, self._matrix) else super().__call__(x)
