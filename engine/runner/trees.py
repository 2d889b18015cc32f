"""Where a step computes trees of draft tokens.

A position has to visit the keys of its path in the order in which plain decoding visits them, or its last bits differ.
So there is no mask over a tree: its first path goes on in the segment of its row, and every branch is a segment of its
own. The table row of a branch shares the blocks that are full before it begins; the block it begins in is a copy, which
gets what this step computes of it as mirrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from slipstream.engine.speculation.scratch import Scratch
from slipstream.engine.speculation.tree import Tree, depths
from slipstream.kernels.batch import Int32


@dataclass(frozen=True, slots=True)
class PlacedTree:
    """The lists have one entry per node."""

    tree: Tree
    slot: int
    positions: list[int]
    """Position in the sequence."""
    batch_rows: list[int]
    table_rows: list[int]
    """Row of the block tables through which the cache keeps the node; the slot itself on the first path."""

    def histories(self, tokens: Int32) -> list[Int32]:
        """What comes before the token that each node predicts, given the slot's tokens with the first path."""
        found: list[Int32] = []
        for node, parent in enumerate(self.tree.parents):
            position = self.positions[node]
            if self.table_rows[node] == self.slot:
                found.append(tokens[: position + 1])
            else:
                before = found[parent] if parent >= 0 else tokens[:position]
                found.append(np.append(before, np.int32(self.tree.tokens[node])))
        return found


@dataclass(slots=True)
class BranchSegments:
    """The branches of all trees of a step: segments that follow those of the rows."""

    scratch: Scratch
    next_row: int
    """Row of the batch that the next node takes."""
    token_ids: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    table_rows: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """Whose branch each is."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Blocks, (source, destination), to copy before the forward pass."""
    mirrors: list[tuple[int, int, int]] = field(default_factory=list)

    def place(
        self, tree: Tree, paths: Sequence[Sequence[int]], slot: int, start: int, length: int, root: int
    ) -> PlacedTree:
        """Adds the branches of a tree over ``length`` known tokens, of which the step computes those from ``start`` on.

        ``paths`` are those that ``branches`` finds; ``root`` is the batch row of the last known token, which the first
        path follows.
        """
        # Right for the first path; the others are placed below.
        positions = [length + depth for depth in depths(tree.parents)]
        rows = [root + 1 - length + position for position in positions]
        placed = PlacedTree(tree, slot, positions, rows, [slot] * len(positions))
        for path in paths[1:]:
            before = tree.parents[path[0]]
            table_row = self.scratch.fork(
                placed.table_rows[before] if before >= 0 else slot, positions[path[0]], positions[path[-1]]
            )
            assert table_row is not None, "more branches to verify than there are blocks for"
            for node in path:
                placed.batch_rows[node], placed.table_rows[node] = self.next_row, table_row
                self.next_row += 1
            self._begin(placed, path[0], table_row, start, length, root)
            self.token_ids += [tree.tokens[node] for node in path]
            self.counts.append(len(path))
            self.ends.append(positions[path[-1]] + 1)
            self.table_rows.append(table_row)
            self.slots.append(slot)
        return placed

    def _begin(self, placed: PlacedTree, node: int, table_row: int, start: int, length: int, root: int) -> None:
        """Fills the first block of a branch up to its first node."""
        end, size = placed.positions[node], self.scratch.block_size
        begin = end - end % size
        if begin == end:
            return
        source, destination = (int(cell) // size for cell in self.scratch.cells([placed.slot, table_row], [begin] * 2))
        if begin < start:
            self.copies.append((source, destination))
        before = placed.tree.parents[node]
        for position in range(end - 1, max(begin, start) - 1, -1):
            if before >= 0:
                row, before = placed.batch_rows[before], placed.tree.parents[before]
            else:
                row = root - (length - 1 - position)
            self.mirrors.append((row, destination, position % size))
