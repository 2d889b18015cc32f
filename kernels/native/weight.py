"""Weight matrices packed as panels of 16 output columns, four of them interleaved (layout in csrc/api.h)."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from slipstream.kernels.native.library import DTYPE_CODES, CLinear, address, load
from slipstream.kernels.stored import Stored

PANEL, GROUP = 16, 4
COLUMNS = GROUP * PANEL
Forms = tuple[tuple[int, int], ...]
"""First panels of what is quantised of a matrix, and its form (csrc/forms.h)."""
PANELS_AT_ONCE = 32
"""Filled at once: freeing large temporaries would hold up other threads for milliseconds."""


def panels_elems(n: int, k: int) -> int:
    """Elements of the panels of a matrix [n, k]."""
    return -(-n // COLUMNS) * COLUMNS * k


class PanelWeight(ABC):
    """A matrix of panels that compiled code computes with, and its bias.

    It may hold several matrices whose panels take turns: filling and reading one of them takes its first panel, and how
    many panels further the next one is.
    """

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        """``dtype`` of panels that are not quantised."""
        self.n, self.k, self.dtype = n, k, dtype
        self.num_panels = -(-n // PANEL)
        self.bias = torch.zeros(self.num_panels * PANEL) if bias else None

    @property
    @abstractmethod
    def num_bytes(self) -> int: ...

    @property
    @abstractmethod
    def is_quantised(self) -> bool: ...

    @property
    @abstractmethod
    def c(self) -> CLinear:
        """What compiled code reads; valid while the weight lives and is not filled."""

    @abstractmethod
    def fill(self, rows: Tensor | Stored, first_row: int = 0, first_panel: int = 0, stride: int = 1) -> None:
        """``rows`` may be blocks that there is a form for (``form_of``)."""

    @abstractmethod
    def rows(self, indices: Tensor, first_panel: int = 0, stride: int = 1) -> Tensor:
        """Rows of the matrix in float32."""

    @property
    def forms(self) -> Forms:
        """What is quantised, and how; to be told to others of its size by ``take_forms``."""
        return ()

    def take_forms(self, forms: Forms) -> None:  # noqa: B027
        """Has numbers that come packed in these forms, where something quantised can be kept."""

    def widen(self) -> None:  # noqa: B027
        """Has everything that comes kept as numbers, and what has come already."""

    def kept(self, indices: Tensor, first_panel: int = 0, stride: int = 1) -> Tensor | Stored:
        """Rows of the matrix as they are kept: to be filled into another one of its size without a loss."""
        return self.rows(indices, first_panel, stride)

    def fill_bias(self, values: Tensor, first_row: int = 0, first_panel: int = 0, stride: int = 1) -> None:
        assert self.bias is not None
        panel, lane = _places(torch.arange(first_row, first_row + len(values)), first_panel, stride)
        self.bias.view(-1, PANEL)[panel, lane] = values.float()

    def biases(self, indices: Tensor, first_panel: int = 0, stride: int = 1) -> Tensor:
        assert self.bias is not None
        return self.bias.view(-1, PANEL)[_places(indices.long(), first_panel, stride)]

    def __call__(self, x: Tensor) -> Tensor:
        """x [m, k], rounded to the format of the panels -> [m, n] float32."""
        library = load()
        assert library is not None and x.shape[1] == self.k
        x = x.float().contiguous()
        out = torch.empty(x.shape[0], self.n)
        c = self.c
        code = DTYPE_CODES[self.dtype]
        library.slip_linear(code, ctypes.byref(c), address(x), x.shape[0], address(out), self.n)
        return out


class PackedWeight(PanelWeight):
    """A ``Weight`` that is kept as panels in one number format."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool = False, memory: Tensor | None = None) -> None:
        """``memory`` [panels_elems(n, k)] for the panels, as a part of something larger."""
        super().__init__(n, k, dtype, bias)
        pair = 2 if dtype is torch.bfloat16 else 1
        # Not set to zero: that would touch all of it here, for a second where a model has gigabytes.
        memory = torch.empty(panels_elems(n, k), dtype=dtype) if memory is None else memory
        self.panels = memory.view(-1, k // pair, GROUP, PANEL, pair)
        if n % COLUMNS:
            self.panels[-1].zero_()  # columns that nobody fills

    @property
    def is_quantised(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        return self.panels.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def fill(self, rows: Tensor | Stored, first_row: int = 0, first_panel: int = 0, stride: int = 1) -> None:
        if isinstance(rows, Stored):
            self._dequantise(rows, first_row, first_panel, stride)
            return
        apart = min(-first_row % PANEL, len(rows))
        whole = apart + (len(rows) - apart) // PANEL * PANEL
        self._fill_apart(rows[:apart], first_row, first_panel, stride)
        panel = first_panel + stride * (-(-first_row // PANEL))
        for part in torch.split(rows[apart:whole], PANELS_AT_ONCE * PANEL):
            self._fill_panels(part, panel, stride)
            panel += stride * PANELS_AT_ONCE
        self._fill_apart(rows[whole:], first_row + whole, first_panel, stride)

    def _dequantise(self, blocks: Stored, first_row: int, first_panel: int, stride: int) -> None:
        library, data = load(), blocks.data
        assert library is not None and data.strides[1] == 1
        library.slip_dequantise(
            *(blocks.format.encode(), data.ctypes.data, data.strides[0], len(data), DTYPE_CODES[self.dtype]),
            *(self.panels.data_ptr(), self.k, first_row, first_panel, stride),
        )

    def _fill_panels(self, rows: Tensor, first: int, stride: int) -> None:
        """Whole panels: first, first + stride, …"""
        pair, each = self.panels.shape[-1], GROUP // stride
        packed = rows.to(self.panels.dtype).reshape(-1, PANEL, self.k // pair, pair).transpose(1, 2)
        if first % GROUP < stride and len(packed) % each == 0:  # whole groups, or the same places of each
            groups = self.panels[first // GROUP :][: len(packed) // each]
            groups[:, :, first % GROUP :: stride].copy_(packed.view(-1, each, *packed.shape[1:]).transpose(1, 2))
        else:
            at = first + stride * torch.arange(len(packed))
            self.panels[at // GROUP, :, at % GROUP] = packed

    def _fill_apart(self, rows: Tensor, first_row: int, first_panel: int, stride: int) -> None:
        """Rows that are no whole panel."""
        if len(rows):
            panel, lane = _places(torch.arange(first_row, first_row + len(rows)), first_panel, stride)
            pairs = rows.to(self.panels.dtype).reshape(len(rows), -1, self.panels.shape[-1])
            self.panels[panel // GROUP, :, panel % GROUP, lane] = pairs

    def rows(self, indices: Tensor, first_panel: int = 0, stride: int = 1) -> Tensor:
        panel, lane = _places(indices.long(), first_panel, stride)
        return self.panels[panel // GROUP, :, panel % GROUP, lane].reshape(len(panel), -1).float()

    @property
    def c(self) -> CLinear:
        return CLinear(self.num_panels * PANEL, self.k, address(self.panels), address(self.bias), None, 0, 0)


def _places(row: Tensor, first_panel: int, stride: int) -> tuple[Tensor, Tensor]:
    """Panel, and lane in it, of rows."""
    return first_panel + stride * (row // PANEL), row % PANEL
