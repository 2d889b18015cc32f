"""Features that wait for a head until it is asked."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from slipstream.engine.models.gpu_memory import MOST_PENDING
from slipstream.engine.speculation.protocol import Computed

LOOSE = 32
"""Steps of which what waits is kept as it came; and positions of a request in a step that are no whole prompt."""


class Pending:
    """Features that the head has not seen: positions start, start + 1, …, as the target made them.

    They are put together and fused when the head is asked, which may be never: until then a step costs next to nothing.
    """

    __slots__ = ("_dtype", "_loose", "_packed", "count", "start")

    def __init__(self, start: int, dtype: torch.dtype) -> None:
        """``dtype``: as what they are kept, in the long run."""
        self.start = start
        self.count = 0
        """Positions in all parts."""
        self._dtype = dtype
        self._packed: deque[Tensor] = deque()
        self._loose: list[Computed] = []
        """What came since, each with all that the target computed in its step."""

    def add(self, computed: Computed) -> None:
        """Adds the features of the next positions."""
        self._loose.append(computed)
        self.count += len(computed.rows)
        if len(self._loose) == LOOSE:
            self.pack()

    def pack(self) -> None:
        """Keeps no memory of others any more, and of more than can wait, the last."""
        if self._loose:
            self._packed.append(torch.cat([entry.features for entry in self._loose]).to(self._dtype))
            self._loose.clear()
        while self.count > MOST_PENDING:
            first = self._packed[0]
            left_out = min(self.count - MOST_PENDING, len(first))
            if left_out == len(first):
                self._packed.popleft()
            else:
                rest = first[left_out:]
                is_small = 2 * rest.nbytes <= first.untyped_storage().nbytes()  # of all that it would keep
                self._packed[0] = rest.clone() if is_small else rest
            self.start += left_out
            self.count -= left_out

    def parts(self) -> list[Tensor]:
        """In the order of positions; now ``start`` and ``count`` are theirs."""
        if self.count > MOST_PENDING:
            self.pack()
        return [*self._packed, *(entry.features for entry in self._loose)]
