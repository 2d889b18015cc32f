"""Tensors as they lie in a file, whatever its format: what weights are made of that compute with packed numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Shares memory with the file: not to be written to."""

    format: str
    """The name that files give it: F32, BF16, Q4_1, …"""
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    """[rows, bytes of a row], rows in Hugging Face's order; a row of a quantised tensor is blocks of numbers, one after
    the other. A vector is one row."""


def in_rows(kind: str, shape: tuple[int, ...], data: memoryview) -> Stored:
    """``data`` is all of a tensor of this format."""
    import numpy as np  # not above: configurations are also read where there is no need of it

    rows = shape[0] if len(shape) > 1 else 1
    flat: npt.NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    return Stored(kind, shape, flat.reshape(rows, -1) if len(flat) else flat.reshape(rows, 0))
