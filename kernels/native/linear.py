"""Weight matrices packed as panels of 16 output columns (layout in csrc/api.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from slipstream.kernels.native.library import DTYPE_CODES, CLinear, address, load

PANEL = 16
ROWS_AT_ONCE = 32 * PANEL
"""Rows packed at once: freeing large temporaries would hold up other threads for milliseconds."""


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, k] -> [n / 16, k / 2, 16, 2] bfloat16 or [n / 16, k, 16, 1] float32; n is padded with zero rows."""
    n, k = weight.shape
    pair = 2 if dtype is torch.bfloat16 else 1
    weight = weight.to(dtype)
    if n % PANEL:
        weight = torch.cat((weight, weight.new_zeros(PANEL - n % PANEL, k)))
    return weight.view(-1, PANEL, k // pair, pair).transpose(1, 2).contiguous()


def unpack(panels: Tensor, n: int) -> Tensor:
    """The inverse of pack: [n, k]."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * PANEL, -1)[:n]


class PackedLinear:
    """y = x W^T + b with W [n, k] kept as panels only."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool = False) -> None:
        self.n, self.k = n, k
        pair = 2 if dtype is torch.bfloat16 else 1
        self.panels = torch.zeros(-(-n // PANEL), k // pair, PANEL, pair, dtype=dtype)
        self.bias = torch.zeros(self.panels.shape[0] * PANEL) if bias else None

    def fill(self, weight: Tensor, first_panel: int = 0, stride: int = 1) -> None:
        """Overwrites panels first_panel, first_panel + stride, … in place with the rows of weight [rows, k]."""
        panels = self.panels[first_panel::stride]
        for rows, into in zip(
            torch.split(weight, ROWS_AT_ONCE), torch.split(panels, ROWS_AT_ONCE // PANEL), strict=False
        ):
            packed = pack(rows, self.panels.dtype)
            into[: len(packed)].copy_(packed)

    def fill_bias(self, bias: Tensor, first_panel: int = 0, stride: int = 1) -> None:
        """As fill, for bias [rows]."""
        assert self.bias is not None
        lanes = torch.zeros(-(-len(bias) // PANEL) * PANEL)
        lanes[: len(bias)] = bias.float()
        self.bias.view(-1, PANEL)[first_panel::stride][: len(lanes) // PANEL].copy_(lanes.view(-1, PANEL))

    @property
    def c(self) -> CLinear:
        return CLinear(self.panels.shape[0] * PANEL, self.k, address(self.panels), address(self.bias))

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, k] float32, rounded to the dtype of the weights -> [rows, n] float32."""
        library = load()
        assert library is not None and x.dtype is torch.float32 and x.shape[1] == self.k
        out = torch.empty(x.shape[0], self.n)
        code = DTYPE_CODES[self.panels.dtype]
        c = self.c
        library.slip_linear(code, ctypes.byref(c), address(x), x.shape[0], address(out), self.n)
        return out
