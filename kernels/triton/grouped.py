"""Matrices whose numbers share a scale by groups, as those of GGUF files do: kept so, multiplied without rounding.

A number is scale * stored + lowest, with a scale and, where the format has one, a lowest number of its group. Stored
are 4 bits, or 8 for formats of 5 to 8 bits, which are read so without taking them apart. Sums of a group are scaled in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.compute import FOUR_BITS
from slipstream.kernels.stored import Stored
from slipstream.kernels.triton.becoming import of_four_bits
from slipstream.kernels.triton.blocks import FORMS, READERS, Form, form_of
from slipstream.kernels.triton.linear import Split, add_parts, store_tile, tile_of
from slipstream.kernels.weight import Weight

ROWS_AT_ONCE = 512
KEPT = {f"grouped as {kind}": form for kind, form in FORMS.items()}
"""What ``GroupedMatrix.kept`` tells is called."""


def grouped_bytes(kind: str, n: int, k: int) -> int:
    """What a matrix [n, k] of this type takes; 0 if there is no form for it."""
    if (form := form_of(kind, k)) is None:
        return 0
    groups = _groups(form, k)
    return n * groups * (form.group * form.bits // 8 + form.scales.itemsize * (1 + form.has_lowest))


def _groups(form: Form, k: int) -> int:
    """Groups of a row: an even number where two share their bytes."""
    groups = k // form.group
    return groups + groups % 2 if form.bits == 4 else groups


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """A matrix [n, k]. Of 4 bits, two groups share bytes: the first is in the low bits, the second in the high ones."""

    form: Form
    k: int
    data: Tensor  # [n, bytes] int8, or uint8 where they hold two numbers
    scale: Tensor  # [n, groups]
    lowest: Tensor | None  # [n, groups], where the form has one

    @classmethod
    def empty(cls, form: Form, n: int, k: int, device: torch.device) -> GroupedMatrix:
        """All numbers are 0."""
        groups = _groups(form, k)
        kind = torch.uint8 if form.bits == 4 else torch.int8
        data = torch.zeros(n, groups * form.group * form.bits // 8, dtype=kind, device=device)
        scale = torch.zeros(n, groups, dtype=form.scales, device=device)
        return cls(form, k, data, scale, torch.zeros_like(scale) if form.has_lowest else None)

    @property
    def n(self) -> int:
        return len(self.data)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + (0 if self.lowest is None else self.lowest.nbytes)

    def fill(self, stored: Stored, first_row: int = 0) -> None:
        """Overwrites rows with blocks of a type of this form, or with what ``kept`` has told of another one."""
        count = stored.shape[0]
        data = torch.from_numpy(stored.data.copy()).to(self.data.device)
        if stored.format in KEPT:
            rows = slice(first_row, first_row + count)
            widths = [part.shape[1] * part.itemsize for part in self._parts]
            for part, held in zip(self._parts, data.split(widths, dim=1), strict=True):
                part[rows] = held.contiguous().view(part.dtype)
            return
        num_bytes, read = READERS[stored.format]
        self._put(first_row, count, *read(data.view(count, -1, num_bytes)))

    def pack(self, rows: Tensor, first_row: int = 0) -> None:
        """Overwrites rows with the nearest to numbers [count, k] that the form has; of 8 bits all are used."""
        form, count = self.form, len(rows)
        if form == FORMS[FOUR_BITS]:
            self._put(first_row, count, *of_four_bits(rows.to(self.data.device, torch.float32)))
            return
        x = rows.to(self.data.device, torch.float32).reshape(count, -1, form.group)
        steps, least = (15, 0) if form.bits == 4 else (254, -127)
        low, high, most = x.amin(-1), x.amax(-1), torch.finfo(form.scales).max

        def kept(numbers: Tensor) -> Tensor:
            return numbers.clamp(-most, most).to(form.scales).float()

        # Without a lowest number 0 is in the middle.
        scale = kept((high - low) / steps if form.has_lowest else torch.maximum(-low, high) / 127)
        lowest = kept(low - least * scale) if form.has_lowest else None
        inverse = torch.where(scale > torch.finfo(torch.float32).tiny, 1 / scale, 0.0)
        above = x if lowest is None else x - lowest[..., None]
        numbers = (above * inverse[..., None]).round().clamp(least, least + steps)
        self._put(first_row, count, numbers.to(torch.uint8 if form.bits == 4 else torch.int8), scale, lowest)

    @property
    def _parts(self) -> list[Tensor]:
        return [self.data, self.scale] if self.lowest is None else [self.data, self.scale, self.lowest]

    def kept(self, indices: Tensor) -> Stored:
        """Rows as they are, for ``fill``."""
        data = torch.cat([part[indices].view(torch.uint8) for part in self._parts], dim=1)
        [name, *_] = (name for name, form in KEPT.items() if form == self.form)
        return Stored(name, (len(indices), self.k), data.cpu().numpy())

    def _put(self, first_row: int, count: int, numbers: Tensor, scale: Tensor, lowest: Tensor | None) -> None:
        groups = self.k // self.form.group
        numbers = numbers.reshape(count, groups, self.form.group)
        if self.form.bits == 4:
            numbers = torch.nn.functional.pad(numbers, (0, 0, 0, groups % 2)).view(count, -1, 2, self.form.group)
            numbers = numbers[:, :, 0] | numbers[:, :, 1] << 4
        rows = slice(first_row, first_row + count)
        self.data[rows] = numbers.reshape(count, -1).to(self.data.dtype)
        self.scale[rows, :groups] = scale.reshape(count, groups).to(self.scale.dtype)
        if self.lowest is not None:
            assert lowest is not None
            self.lowest[rows, :groups] = lowest.reshape(count, groups).to(self.scale.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """[len(indices), k] float32: the numbers of some rows."""
        data, scale = self.data[indices], self.scale[indices].float()[:, :, None]
        if self.form.bits == 4:
            pairs = data.view(len(data), -1, self.form.group)
            data = torch.stack((pairs & 15, pairs >> 4), dim=2)
        numbers = data.view(len(data), -1, self.form.group).float() * scale
        if self.lowest is not None:
            numbers = numbers + self.lowest[indices].float()[:, :, None]
        return numbers.flatten(1)[:, : self.k]


@triton.jit(do_not_specialize=["m"])
def grouped_linear_kernel(
    x,
    data,
    scale,
    lowest,
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
    HAS_LOWEST: tl.constexpr,
    PER_BYTE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    at_m, at_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), 8)
    row, column = at_m * BLOCK_M + tl.arange(0, BLOCK_M), at_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, GROUP)
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
        # So many bytes hold as many groups as there are numbers in a byte.
        for start in range(part * SPLIT // PER_BYTE, tl.cdiv(end, PER_BYTE * GROUP) * GROUP, GROUP):
            held = tl.load(data_rows + (start + inner)[:, None], mask=is_column, other=0)
            for half in tl.static_range(PER_BYTE):
                group = start // GROUP * PER_BYTE + half
                at = group * GROUP + inner
                a = tl.load(x_rows + at[None, :], mask=is_row & (at < k)[None, :], other=0.0)
                stored = held
                if PER_BYTE == 2:
                    stored = (held >> (4 * half)) & 15
                scales = tl.load(scale + scale_rows + group, mask=column < n, other=0.0).to(tl.float32)
                sums += tl.dot(a, stored.to(tl.float32).to(dtype), input_precision="ieee") * scales[None, :]
                if HAS_LOWEST:
                    least = tl.load(lowest + scale_rows + group, mask=column < n, other=0.0).to(tl.float32)
                    sums += tl.sum(a.to(tl.float32), 1)[:, None] * least[None, :]
        total += sums
    store_tile(total, row, column, bias, out, parts, m, n, out_stride, APART, HAS_BIAS)


def grouped_linear(x: Tensor, matrix: GroupedMatrix, bias: Tensor | None = None, tile_rows: int = 0) -> Tensor:
    """x [m, k] times the transpose of a matrix [n, k], plus bias [n]: [m, n] in the format of x.

    Args:
        x: bfloat16, float16 or float32, with contiguous rows.
        tile_rows: as in ``quantized.quantized_linear``.
    """
    m, k = x.shape
    n, form = matrix.n, matrix.form
    if matrix.k != k or x.stride(1) != 1 or tile_rows not in (0, 16, 64):
        raise ValueError(f"the product of {tuple(x.shape)} with the transpose of {(n, matrix.k)}, {tile_rows=}")
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not m:
        return out
    block_m, block_n = tile_rows or (16 if m <= 16 else 64), 64
    if x.dtype is torch.float32:
        block_m, block_n = 16, 32
    per_byte = 8 // form.bits
    split = Split.of(n, k, block_n, per_byte * form.group)
    grid, parts = split.programs(m, n, block_m, block_n, x.device)
    grouped_linear_kernel[grid](
        *(x, matrix.data, matrix.scale, matrix.lowest, bias, out, parts, m, n, k),
        *(x.stride(0), matrix.data.stride(0), matrix.scale.stride(0), out.stride(0)),
        SPLIT=split.size,
        SPLITS=split.count,
        APART=parts is not None,
        HAS_BIAS=bias is not None,
        HAS_LOWEST=form.has_lowest,
        PER_BYTE=per_byte,
        GROUP=form.group,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,  # so that parts computed apart give the same bits
    )
    if parts is not None:
        add_parts(parts, None, bias, out)
    return out


class GroupedWeight:
    """A ``Weight`` that is kept as it came: what comes as blocks that have a form stays so.

    What comes as numbers, or as blocks of another form than those before, makes all of the matrix a dense one; unless
    it was told a form in which numbers are packed (``take_forms``).
    """

    def __init__(
        self,
        n: int,
        k: int,
        device: torch.device,
        make_dense: Callable[[], Weight],
        dtype: torch.dtype,
        bias: bool = False,
        tile_rows: int = 0,
        numbers_as: str = "",
    ) -> None:
        """``make_dense`` makes the same matrix in ``dtype``, the format of activations; ``tile_rows`` as in
        ``grouped_linear``; ``numbers_as`` is the type of blocks that numbers become, where rows are whole ones."""
        self.n, self.k = n, k
        self._device, self._make_dense, self._dtype, self._tile_rows = device, make_dense, dtype, tile_rows
        self._bias = torch.zeros(n, dtype=dtype, device=device) if bias else None
        self._grouped: GroupedMatrix | None = None
        self._dense: Weight | None = None
        self._form: Form | None = form_of(numbers_as, k)
        """What numbers are packed into."""

    @property
    def forms(self) -> Form | None:
        return None if self._grouped is None else self._grouped.form

    def take_forms(self, forms: Form | None) -> None:
        self._form = forms or self._form

    def widen(self) -> None:
        self._made_dense()

    def kept(self, indices: Tensor) -> Tensor | Stored:
        return self._made_dense().rows(indices) if self._grouped is None else self._grouped.kept(indices)

    @property
    def num_bytes(self) -> int:
        """As long as nothing came, of numbers."""
        matrix = self.n * self.k * self._dtype.itemsize if self._grouped is None else self._grouped.num_bytes
        if self._grouped is None and self._dense is None and self._form is not None:
            matrix = grouped_bytes(next(kind for kind, form in FORMS.items() if form == self._form), self.n, self.k)
        return matrix + (0 if self._bias is None else self._bias.nbytes)

    def fill(self, rows: Tensor | Stored, first_row: int = 0) -> None:
        if isinstance(rows, Stored):
            form = KEPT.get(rows.format) or form_of(rows.format, self.k)
            assert form is not None, "only blocks that have a form come as blocks"
            if (grouped := self._made_grouped(form)) is not None and grouped.form == form:
                grouped.fill(rows, first_row)
                return
            part = GroupedMatrix.empty(form, rows.shape[0], self.k, self._device)
            part.fill(rows)
            rows = part.rows(torch.arange(part.n, device=self._device))
        elif self._form is not None and (grouped := self._made_grouped(self._form)) is not None:
            grouped.pack(rows, first_row)
            return
        self._made_dense().fill(rows, first_row)

    def fill_bias(self, values: Tensor, first_row: int = 0) -> None:
        assert self._bias is not None
        self._bias[first_row : first_row + len(values)].copy_(values)
        if self._dense is not None:
            self._dense.fill_bias(values, first_row)

    def rows(self, indices: Tensor) -> Tensor:
        if self._grouped is None:
            return self._made_dense().rows(indices)
        return self._grouped.rows(indices).to(self._dtype)

    def biases(self, indices: Tensor) -> Tensor:
        assert self._bias is not None
        return self._bias[indices]

    def __call__(self, x: Tensor) -> Tensor:
        if self._grouped is None:
            return self._made_dense()(x)
        return grouped_linear(x.to(self._dtype), self._grouped, self._bias, self._tile_rows)

    def _made_grouped(self, form: Form) -> GroupedMatrix | None:
        """The packed matrix, of this form if there was none; None where it is a dense one."""
        if self._grouped is None and self._dense is None:
            self._grouped = GroupedMatrix.empty(form, self.n, self.k, self._device)
        return self._grouped

    def _made_dense(self) -> Weight:
        if self._dense is None:
            self._dense, grouped, self._grouped = self._make_dense(), self._grouped, None
            if self._bias is not None:
                self._dense.fill_bias(self._bias)
            for first in range(0, self.n if grouped is not None else 0, ROWS_AT_ONCE):
                assert grouped is not None
                rows = torch.arange(first, min(first + ROWS_AT_ONCE, self.n), device=self._device)
                self._dense.fill(grouped.rows(rows), first)
        return self._dense


class JoinedWeight:
    """Matrices under one another, with forms of their own, as one that is computed with."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self.parts = parts

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)
