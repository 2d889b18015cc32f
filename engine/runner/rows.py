"""The running requests as one table: a row per slot, from which a step reads what it needs besides its plan.

The runner keeps tokens and lengths itself, so a plan can name a token that the step before it has yet to sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slipstream.engine.grammars.grammar import Constraint
from slipstream.engine.messages import SamplingParams
from slipstream.engine.plan import NewRow
from slipstream.engine.runner.row_drafts import RowDrafts
from slipstream.engine.runner.sampler import SamplingColumns
from slipstream.kernels.batch import Int32


class RowTable:
    """Columns with an entry per slot; ``tokens`` and ``blocks`` are views that drafters share."""

    def __init__(self, slots: int, tokens: int, blocks: int, branch_rows: int) -> None:
        """Rows of so many tokens and blocks; ``branch_rows`` rows of blocks more, for branches of trees."""
        self.tokens = np.zeros((slots, tokens), np.int32)
        self.lengths = np.zeros(slots, np.int32)
        """Known tokens of each row, sampled ones included."""
        self.blocks = np.zeros((slots + branch_rows, blocks), np.int32)
        self.adapters = np.zeros(slots, np.int32)
        """Numbers of those that rows are computed with, 0 for none."""
        self.sampling = SamplingColumns(slots)
        self.constraints: dict[int, Constraint] = {}
        """Rows whose request has a grammar."""
        self._drafts: list[RowDrafts | None] = [None] * slots

    def enter(self, new: NewRow, drafts: RowDrafts) -> None:
        """A request takes a row, whose tokens are written already."""
        self.lengths[new.slot] = len(new.tokens)
        self.adapters[new.slot] = new.adapter
        self.sampling.enter(new.slot, new.request.params, new.seed, len(new.request.prompt))
        self._drafts[new.slot] = drafts
        self.constraints.pop(new.slot, None)
        if drafts.constraint is not None:
            self.constraints[new.slot] = drafts.constraint

    def map(self, slot: int, first: int, blocks: list[int], block_size: int) -> None:
        """The row has these blocks now, ``first`` being the index of the first of them."""
        self.blocks[slot, first : first + len(blocks)] = blocks
        self.drafts(slot).draft.mapped = (first + len(blocks)) * block_size

    def append(self, slot: int, tokens: list[int]) -> None:
        """Appends tokens that were sampled."""
        length = int(self.lengths[slot])
        self.tokens[slot, length : length + len(tokens)] = tokens
        self.lengths[slot] = self.drafts(slot).draft.length = length + len(tokens)
        if self.constraints and (constraint := self.constraints.get(slot)) is not None:
            constraint.advance(tokens)

    def shortened(self, slots: list[int]) -> frozenset[int]:
        """Which of these rows' answers could not go on as their grammars want; see Constraint.is_shortened."""
        found = [self.constraints.get(slot) for slot in slots] if self.constraints else []
        return frozenset(row for row, each in enumerate(found) if each is not None and each.is_shortened)

    def expect(self, slots: Int32, counts: Int32 | int, last: Int32) -> None:
        """Each of these rows gets so many tokens at most that only the device knows yet.

        ``last`` stand for the last of them, see ``Standing.sampled``.
        """
        self.lengths[slots] += counts
        self.tokens[slots, self.lengths[slots] - 1] = last

    def arrive(self, slot: int, at: int, tokens: Sequence[int], missed: int, last: int) -> None:
        """Tokens that were expected from ``at`` on are known, and that ``missed`` of them never come.

        ``last`` as in ``expect``.
        """
        end = at + len(tokens)
        self.tokens[slot, at:end] = tokens
        self.lengths[slot] -= missed
        self.drafts(slot).draft.length = end
        if self.lengths[slot] > end:  # a step behind this one expects some, too
            self.tokens[slot, self.lengths[slot] - 1] = last

    def drafts(self, slot: int) -> RowDrafts:
        found = self._drafts[slot]
        assert found is not None, "a row that no request has"
        return found

    def params(self, slot: int) -> SamplingParams:
        return self.sampling.params[slot]

    def num_prompt(self, slot: int) -> int:
        return int(self.sampling.num_prompt[slot])

    def known(self, slot: int) -> Int32:
        """The known tokens of a row; a view."""
        return self.tokens[slot, : self.lengths[slot]]

    def clear(self) -> None:
        """No request has a row any more."""
        self._drafts = [None] * len(self._drafts)
        self.constraints.clear()
