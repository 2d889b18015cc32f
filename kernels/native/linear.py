"""Weight matrices packed as panels of 16 output columns, four of them interleaved (layout in csrc/api.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from slipstream.kernels.batch import Int32
from slipstream.kernels.native.library import DTYPE_CODES, CLinear, address, load

PANEL, GROUP = 16, 4
COLUMNS = GROUP * PANEL
PANELS_AT_ONCE = 32
"""Filled at once: freeing large temporaries would hold up other threads for milliseconds."""


def panels_elems(n: int, k: int) -> int:
    """Elements of the panels of a matrix [n, k]."""
    return -(-n // COLUMNS) * COLUMNS * k


class PackedLinear:
    """y = x W^T + b with W [n, k] kept as panels only."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool = False, memory: Tensor | None = None) -> None:
        """``memory`` [panels_elems(n, k)] for the panels, as a part of something larger."""
        self.n, self.k = n, k
        self._num_panels = -(-n // PANEL)
        pair = 2 if dtype is torch.bfloat16 else 1
        memory = torch.zeros(panels_elems(n, k), dtype=dtype) if memory is None else memory
        self.panels = memory.view(-1, k // pair, GROUP, PANEL, pair)
        self.bias = torch.zeros(self._num_panels * PANEL) if bias else None

    def fill(self, weight: Tensor, first_panel: int = 0, stride: int = 1) -> None:
        """Overwrites panels first_panel, first_panel + stride, … in place with the rows of weight [rows, k]."""
        pair = self.panels.shape[-1]
        for part, rows in enumerate(torch.split(weight, PANELS_AT_ONCE * PANEL)):
            rows = rows.to(self.panels.dtype)
            if len(rows) % PANEL:
                rows = torch.cat((rows, rows.new_zeros(PANEL - len(rows) % PANEL, self.k)))
            packed = rows.view(-1, PANEL, self.k // pair, pair).transpose(1, 2)
            first, each = first_panel + stride * part * PANELS_AT_ONCE, GROUP // stride
            if first % GROUP < stride and len(packed) % each == 0:  # whole groups, or the same places of each
                groups = self.panels[first // GROUP :][: len(packed) // each]
                groups[:, :, first % GROUP :: stride].copy_(packed.view(-1, each, *packed.shape[1:]).transpose(1, 2))
            else:
                at = first + stride * torch.arange(len(packed))
                self.panels[at // GROUP, :, at % GROUP] = packed

    def fill_bias(self, bias: Tensor, first_panel: int = 0, stride: int = 1) -> None:
        """As fill, for bias [rows]."""
        assert self.bias is not None
        lanes = torch.zeros(-(-len(bias) // PANEL) * PANEL)
        lanes[: len(bias)] = bias.float()
        self.bias.view(-1, PANEL)[first_panel::stride][: len(lanes) // PANEL].copy_(lanes.view(-1, PANEL))

    def rows(self, indices: Int32) -> Tensor:
        """[len(indices), k] float32: rows of W, as an embedding looks them up."""
        at = torch.from_numpy(indices).long()
        return self.panels[at // COLUMNS, :, at % COLUMNS // PANEL, at % PANEL].reshape(len(at), -1).float()

    @property
    def c(self) -> CLinear:
        return CLinear(self._num_panels * PANEL, self.k, address(self.panels), address(self.bias))

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, k] float32, rounded to the dtype of the weights -> [rows, n] float32."""
        library = load()
        assert library is not None and x.dtype is torch.float32 and x.shape[1] == self.k
        out = torch.empty(x.shape[0], self.n)
        code = DTYPE_CODES[self.panels.dtype]
        c = self.c
        library.slip_linear(code, ctypes.byref(c), address(x), x.shape[0], address(out), self.n)
        return out
