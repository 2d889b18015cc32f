"""AWQ in its layout for products of many rows: ``qweight`` [k, n / 8] words along the outputs, ``qzeros``
[groups, n / 8], ``scales`` [groups, n]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slipstream.engine.checkpoint.quantised.matrix import (
    Grouped,
    Matrix,
    Module,
    Whole,
    group_size,
    unpacked,
    words_of,
)

if TYPE_CHECKING:
    from torch import Tensor

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which half byte of a word, from the lowest on, each of its eight outputs is."""


@dataclass(frozen=True)
class AWQ:
    group_size: int
    """-1 for one group."""
    parts: str = r"(.+)\.(qweight|qzeros|scales)"

    def matrix(self, module: Module) -> Matrix:
        words, n, groups, zeros = words_of(module, per_word=8)
        k = words.shape[0]
        if zeros.shape != (groups, n // 8):
            raise module.misfit("qzeros")
        parts = Whole(
            lambda: _outputs(module.tensor("qweight")),
            lambda: module.scales("scales").t().contiguous(),
            lambda: _outputs(module.tensor("qzeros")),
            group_size(module, "scales", self.group_size, k, groups),
        )
        return Grouped((n, k), 4, parts)


def _outputs(words: Tensor) -> Tensor:
    """[rows, n / 8] -> [n, rows]."""
    rows = len(words)
    return unpacked(words, 4).view(rows, -1, 8)[:, :, list(ORDER)].view(rows, -1).t().contiguous()
