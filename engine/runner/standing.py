"""What the device knows of running requests, and the host does not before it has read a step."""

from __future__ import annotations

from typing import TypeVar

import torch

from slipstream.kernels.batch import Int32

Slots = TypeVar("Slots", int, Int32)


class Standing:
    """Where requests stand after the step that was launched last: a row of numbers per slot, always in the same memory.

    A step that is launched before that one is read names these numbers by their places: see ``RaggedBatch.latest``.
    """

    def __init__(self, slots: int, drafts: int, device: torch.device) -> None:
        self.rows = torch.zeros(slots + 1, 2 + drafts, dtype=torch.int32, device=device)
        """[slots + 1, 2 + drafts] int32: how many draft tokens of the last step were wrong, the token that was sampled
        last, and draft tokens that follow it. Nothing but 0 in the last row, which is nobody's."""
        self.latest = self.rows.view(-1)
        """The same, [n]."""
        self.missed = self.rows[:, 0]
        self._width = self.rows.shape[1]

    def sampled(self, slots: Slots) -> Slots:
        """Token ids that stand for the tokens that were sampled last in these slots."""
        return -2 - slots * self._width

    def drafts(self, slot: int, count: int) -> list[int]:
        """Token ids that stand for the first draft tokens that follow."""
        before = self.sampled(slot)
        return [before - 1 - node for node in range(count)]
