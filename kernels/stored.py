"""Tensors as they lie in a file, whatever its format: what weights are made of that compute with quantised numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Quantize = Literal["none", "q8", "q4"]
"""What matrices that come as numbers are quantised to when they come."""


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Shares memory with the file: not to be written to."""

    format: str
    """The name that files give it: F32, BF16, Q4_1, …"""
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    """[rows, bytes of a row], rows in Hugging Face's order; a row of a quantised tensor is blocks of numbers, one after
    the other. A vector is one row."""

    def rows(self, first: int, count: int) -> Stored:
        """Some rows of a matrix."""
        return Stored(self.format, (count, *self.shape[1:]), self.data[first : first + count])
