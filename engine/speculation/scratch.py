"""Cache blocks for branches of trees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slipstream.kernels.batch import Int32


class Scratch:
    """Blocks besides those of the pool, lent for one forward pass of the target or one proposal of a drafter.

    Each brings a row of the block tables along: the row of a branch is that of its first block.
    """

    def __init__(self, tables: Int32, first_block: int, count: int, block_size: int) -> None:
        """The last ``count`` rows of ``tables`` [rows, blocks] and the blocks from ``first_block`` on are lent."""
        self.count = count
        self.block_size = block_size
        self._tables = tables
        self._first_block = first_block
        self._first_row = len(tables) - count
        self._used = 0

    def reset(self) -> None:
        """Takes everything back."""
        self._used = 0

    def need(self, first: int, last: int) -> int:
        """Blocks of a branch with these positions, both included."""
        return last // self.block_size - first // self.block_size + 1

    def fork(self, row: int, first: int, last: int) -> int | None:
        """A table row with its own blocks for positions ``first`` to ``last``, and those of ``row`` before them.

        None if too few blocks are left. The first of its own blocks is empty also where it holds earlier positions.
        """
        count = self.need(first, last)
        if self._used + count > self.count:
            return None
        mine, begin = self._first_row + self._used, first // self.block_size
        self._tables[mine, :begin] = self._tables[row, :begin]
        blocks = np.arange(self._used, self._used + count, dtype=np.int32) + self._first_block
        self._tables[mine, begin : begin + count] = blocks
        self._used += count
        return mine

    def cells(self, rows: Sequence[int], positions: Sequence[int]) -> Int32:
        """The cache cells of positions of table rows, as block * block_size + offset."""
        at = np.asarray(positions, np.int32)
        blocks = self._tables[np.asarray(rows, np.intp), at // self.block_size]
        return (blocks * self.block_size + at % self.block_size).astype(np.int32)
