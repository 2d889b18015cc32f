"""Weight matrices that are kept as they came: blocks of a file in their own precision (csrc/forms.h)."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.kernels.compute import Arithmetic
from slipstream.kernels.native.library import CLinear, CPart, address, isa, load
from slipstream.kernels.native.weight import PANEL, Forms, PackedWeight, PanelWeight, panels_elems
from slipstream.kernels.stored import Stored

ARITHMETIC_CODES: dict[Arithmetic, int] = {"exact": 0, "int8": 1, "int16": 2, "bfloat16": 3}
ALIGNMENT = 64
ARENA_BYTES = 32 << 20
ROWS_AT_ONCE = 512
BLOCK = 32
NUMBERS = {torch.float32: "F32", torch.bfloat16: "BF16"}
FAST_AT_ROUNDING = ("avx512bf16",)
"""Instruction sets with which blocks that are rounded to bfloat16 in registers were measured to be faster than weights
in it."""
KEPT_BYTES = 40
"""SLIP_KEPT_BYTES of csrc/api.h: a block of 32 numbers, whatever its form."""


def form_of(kind: str, k: int) -> int:
    """Number of the form that rows of k numbers of this type of GGUF files are packed into; 0 if they cannot be."""
    library = load()
    return 0 if library is None else int(library.slip_form(kind.encode(), k))


def part_bytes(form: int, panels: int, k: int) -> int:
    library = load()
    assert library is not None
    return int(library.slip_part_bytes(form, panels, k))


def packed_bytes(kind: str, n: int, k: int) -> int:
    """What a matrix [n, k] of this type takes; 0 if there is no form for it."""
    form = form_of(kind, k)
    return part_bytes(form, -(-n // PANEL), k) if form else 0


def rounds_fast() -> bool:
    return isa() in FAST_AT_ROUNDING


class Arena:
    """Memory for many matrices, which lie in it in the order of asking.

    The system gives large pages to pieces of 2 MiB and more only, and layers of small models are smaller.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """[size] bytes of zeros."""
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        if taken > len(self._free):
            self._free = torch.empty(max(taken, ARENA_BYTES), dtype=torch.uint8)
        piece, self._free = self._free[:size], self._free[taken:]
        return piece.zero_()


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Panels of one form."""

    form: int
    first_panel: int
    panels: int
    memory: Tensor
    c: CPart

    @classmethod
    def empty(cls, form: int, k: int, first_panel: int, panels: int, arena: Arena) -> _Part:
        memory = arena.take(part_bytes(form, panels, k))
        return cls(form, first_panel, panels, memory, CPart(form, first_panel, panels, 0, memory.data_ptr()))

    def pack(self, stored: Stored, first_row: int, first_panel: int, stride: int) -> None:
        library, data = load(), stored.data
        assert library is not None and data.strides[1] == 1
        library.slip_pack(
            *(stored.format.encode(), data.ctypes.data, data.strides[0], len(data), ctypes.byref(self.c)),
            *(stored.shape[1], first_row, first_panel - self.first_panel, stride),
        )

    def unpack(self, k: int, rows: Tensor, first_panel: int, stride: int) -> Tensor:
        library = load()
        assert library is not None
        rows = rows.long().contiguous()
        out = torch.empty(len(rows), k)
        library.slip_unpack(
            *(ctypes.byref(self.c), k, rows.data_ptr(), len(rows)),
            *(first_panel - self.first_panel, stride, out.data_ptr()),
        )
        return out

    def keep(self, k: int, rows: Tensor, first_panel: int, stride: int) -> Stored:
        """The same as blocks, which ``pack`` takes."""
        library = load()
        assert library is not None
        rows = rows.long().contiguous()
        out = torch.empty(len(rows), k // BLOCK * KEPT_BYTES, dtype=torch.uint8)
        library.slip_keep(
            *(ctypes.byref(self.c), k, rows.data_ptr(), len(rows)),
            *(first_panel - self.first_panel, stride, out.data_ptr()),
        )
        return Stored(f"form {self.form}", (len(rows), k), out.numpy())


class StoredWeight(PanelWeight):
    """A ``Weight`` that is kept as it came.

    What comes as blocks that there is a form for stays quantised, and is read at that size. What comes as numbers is
    kept in ``dtype``, as in a ``PackedWeight``, and then the whole matrix is; unless it is to become blocks of a type
    (``numbers_as``), or was told forms in which numbers are packed (``take_forms``).
    """

    def __init__(
        self,
        n: int,
        k: int,
        dtype: torch.dtype,
        bias: bool = False,
        segments: Sequence[int] = (0,),
        arithmetic: Arithmetic = "exact",
        arena: Arena | None = None,
        numbers_as: Sequence[str] = (),
    ) -> None:
        """
        Args:
            segments: first panels of matrices that may have formats of their own, ascending.
            numbers_as: for each segment a type of GGUF files, of whose form numbers become where rows are whole blocks.
        """
        super().__init__(n, k, dtype, bias)
        self._borders = [*segments, self.num_panels]
        self._arithmetic: Arithmetic = arithmetic
        self._arena = arena or Arena()
        self._parts: dict[int, _Part] = {}
        """By first panels."""
        self._forms: Forms = ()
        self._own_forms = {at: form_of(kind, k) for at, kind in zip(segments, numbers_as, strict=bool(numbers_as))}
        self._dense: PackedWeight | None = None
        self._c_parts: ctypes.Array[CPart] | None = None

    @property
    def is_quantised(self) -> bool:
        return bool(self._parts)

    @property
    def num_bytes(self) -> int:
        """As long as nothing came, of numbers."""
        matrix = sum(part.memory.nbytes for part in self._parts.values())
        own = self._own_forms
        if not matrix and self._dense is None and own and all(own.values()):
            sizes = ((form, self._segment(first)[1]) for first, form in own.items())
            matrix = sum(part_bytes(form, panels, self.k) for form, panels in sizes)
        dense = panels_elems(self.n, self.k) * self.dtype.itemsize
        return (matrix or dense) + (0 if self.bias is None else self.bias.nbytes)

    def fill(self, rows: Tensor | Stored, first_row: int = 0, first_panel: int = 0, stride: int = 1) -> None:
        blocks = rows if isinstance(rows, Stored) else None
        if isinstance(rows, Tensor) and (form := self._form_of_numbers(first_panel)):
            blocks = as_form(rows, form)
        if blocks is not None and self._dense is None and (part := self._part_for(blocks.format, first_panel)):
            part.pack(blocks, first_row, first_panel, stride)
            return
        self._made_dense().fill(rows, first_row, first_panel, stride)

    @property
    def forms(self) -> Forms:
        return tuple((first, part.form) for first, part in sorted(self._parts.items()))

    def take_forms(self, forms: Forms) -> None:
        self._forms = forms

    def widen(self) -> None:
        self._made_dense()

    def kept(self, indices: Tensor, first_panel: int = 0, stride: int = 1) -> Tensor | Stored:
        if self._dense is not None:
            return self._dense.rows(indices, first_panel, stride)
        return self._parts[self._segment(first_panel)[0]].keep(self.k, indices, first_panel, stride)

    def rows(self, indices: Tensor, first_panel: int = 0, stride: int = 1) -> Tensor:
        if self._dense is not None:
            return self._dense.rows(indices, first_panel, stride)
        return self._parts[self._segment(first_panel)[0]].unpack(self.k, indices, first_panel, stride)

    @property
    def c(self) -> CLinear:
        size, bias = self.num_panels * PANEL, address(self.bias)
        if self._dense is not None:
            return CLinear(size, self.k, address(self._dense.panels), bias, None, 0, 0)
        if self._c_parts is None:  # made once: structs that have been given out point to it
            self._c_parts = (CPart * len(self._parts))(*(part.c for _, part in sorted(self._parts.items())))
        return CLinear(size, self.k, None, bias, self._c_parts, len(self._parts), ARITHMETIC_CODES[self._arithmetic])

    def _segment(self, panel: int) -> tuple[int, int]:
        """First panel and number of panels of the segment that this panel is in."""
        at = bisect_right(self._borders, panel) - 1
        return self._borders[at], self._borders[at + 1] - self._borders[at]

    def _form_of_numbers(self, panel: int) -> int:
        """What numbers for the segment that this panel is in are packed into; 0 for nothing."""
        if self._dense is not None:
            return 0
        first, _ = self._segment(panel)
        part = self._parts.get(first)
        return (
            part.form
            if part is not None and self._forms
            else dict(self._forms).get(first, self._own_forms.get(first, 0))
        )

    def _part_for(self, kind: str, panel: int) -> _Part | None:
        """Where matrices of this format go; None if it cannot be quantised there."""
        first, count = self._segment(panel)
        form, part = form_of(kind, self.k), self._parts.get(first)
        if part is None and form:
            part = self._parts[first] = _Part.empty(form, self.k, first, count, self._arena)
            self._c_parts = None
        return part if part is not None and part.form == form else None

    def _made_dense(self) -> PackedWeight:
        if self._dense is None:
            self._dense = PackedWeight(self.n, self.k, self.dtype)
            for part in self._parts.values():
                for rows in torch.split(torch.arange(part.panels * PANEL), ROWS_AT_ONCE):
                    numbers = part.unpack(self.k, rows, part.first_panel, 1)
                    self._dense.fill(numbers, int(rows[0]), part.first_panel)
            self._parts.clear()
        return self._dense


def as_form(rows: Tensor, form: int) -> Stored:
    """Numbers [n, k] that packing makes blocks of a form of."""
    rows = (rows if rows.dtype in NUMBERS else rows.float()).cpu().contiguous()
    return Stored(f"form {form} of {NUMBERS[rows.dtype]}", tuple(rows.shape), rows.view(torch.uint8).numpy())
