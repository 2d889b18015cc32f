"""Weight matrices: filled by rows from any source, called on activations, in a format of their own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from slipstream.kernels import ops


class Weight(Protocol):
    """A matrix [n, k], and a bias [n] if it was made with one."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Memory it takes, bias included."""

    def fill(self, rows: Tensor, first_row: int = 0) -> None:
        """Overwrites rows first_row, first_row + 1, … in place with rows [m, k] of any number format and device.

        So a matrix may come whole, or in parts of any size and order.
        """

    def fill_bias(self, values: Tensor, first_row: int = 0) -> None:
        """Overwrites values first_row, first_row + 1, … of the bias with values [m]; see ``fill``."""

    def rows(self, indices: Tensor) -> Tensor:
        """[len(indices), k]: rows of the matrix, as an embedding looks them up; indices [m] of integers."""

    def biases(self, indices: Tensor) -> Tensor:
        """[len(indices)]: values of the bias, of a matrix that has one."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [m, k] of any number format, times the transpose, plus the bias: [m, n]."""


class DenseWeight:
    """One tensor in one number format, in which it is also computed with; on any device."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device, bias: bool = False) -> None:
        self.n, self.k = n, k
        self._matrix = torch.empty(n, k, dtype=dtype, device=device)
        self._bias = torch.zeros(n, dtype=dtype, device=device) if bias else None

    @property
    def num_bytes(self) -> int:
        return self._matrix.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def fill(self, rows: Tensor, first_row: int = 0) -> None:
        self._matrix[first_row : first_row + len(rows)].copy_(rows)

    def fill_bias(self, values: Tensor, first_row: int = 0) -> None:
        assert self._bias is not None
        self._bias[first_row : first_row + len(values)].copy_(values)

    def rows(self, indices: Tensor) -> Tensor:
        return ops.embedding(indices, self._matrix)

    def biases(self, indices: Tensor) -> Tensor:
        assert self._bias is not None
        return self._bias[indices]

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x.to(self._matrix.dtype), self._matrix, self._bias)
