"""A head's chains behind a step that nobody has read yet.

The head sees the tokens that the step samples where the step itself had the draft tokens before them, so both have the
same rows. What comes after the last token that counts is rejected draft tokens, which nothing before it attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.drafter.choosing import Choice, Draft, parameters_of
from slipstream.drafter.head.network import HeadNetwork
from slipstream.drafter.head.pending import Pending
from slipstream.engine.speculation.protocol import Coming, DraftHost, DraftRow, Proposal
from slipstream.kernels.batch import Int32, make_batch
from slipstream.kernels.compute import ChainInputs, Chains

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Draft tokens that the device makes at once, and that a row verifies: as many as one of these says, for each of which
there is a graph."""


@dataclass(slots=True)
class Ahead:
    """Chains of rows that share a head."""

    coming: Sequence[Coming]
    places: list[tuple[int, int, int]]
    """For each row its slot, draft tokens that were wanted, and positions that had a block."""
    parts: list[list[Tensor]]
    """What waits of each row besides what the step computes."""
    depth: int
    version: int
    _network: HeadNetwork
    _chains: Chains
    _choice: Choice
    stop_below: float
    found: NDArray[np.int32] | None = field(default=None)
    """[depth, rows, 3] a draft token and its probability, a float64; None until that is known."""

    @classmethod
    def of(
        cls,
        coming: Sequence[Coming],
        waiting: Sequence[Pending],
        network: HeadNetwork,
        version: int,
        choice: Choice,
        stop_below: float,
        host: DraftHost,
    ) -> Ahead | None:
        """None where the network cannot do it."""
        parts = [pending.parts() for pending in waiting]
        rows = [each.row for each in coming]
        slots = np.array([row.slot for row in rows], np.int32)
        lengths = np.array([each.start + each.known for each in coming], np.int32)
        drafted = np.array([len(each.drafts) for each in coming], np.int32)
        wanted = np.array([row.most - 1 for row in rows], np.int32)
        most, depth = _at_least(max(1, int(drafted.max()))), _at_least(int(wanted.max()) + 1)
        if most is None or depth is None:
            return None
        first = np.cumsum(drafted + 1, dtype=np.int32) - drafted - 1
        ids: list[Int32] = []
        verified = np.full((len(rows), most), -1, np.int32)
        for at, (each, pending) in enumerate(zip(coming, waiting, strict=True)):
            ids.append(each.row.tokens[pending.start + 1 : lengths[at]])
            ids.append(np.arange(-1 - first[at], -2 - first[at] - drafted[at], -1, dtype=np.int32))
            verified[at, : drafted[at]] = [token if token >= 0 else token - 1 for token in each.drafts]
        counts = np.array([pending.count + each.known for each, pending in zip(coming, waiting, strict=True)], np.int32)
        counts += drafted
        batch = make_batch(
            *(np.concatenate(ids), counts, lengths + drafted, host.block_tables, slots, host.block_size),
            latest=host.latest,
            missed=host.missed,
        )
        if host.missed is not None:
            is_late = np.array([each.is_late for each in coming], np.bool_)
            batch = replace(batch, whose=np.where(is_late, slots, np.int32(len(host.missed) - 1)))
        samples = [np.arange(each.sample, each.sample + len(each.drafts) + 1, dtype=np.int32) for each in coming]
        numbers = [int(length) + 1 - row.num_prompt for length, row in zip(lengths, rows, strict=True)]
        given = ChainInputs(
            batch,
            np.concatenate(samples),
            first,
            verified,
            batch.q_start[1:] - 1 - drafted,
            # The first draft token goes to the place of the token that comes now.
            np.array([row.mapped for row in rows], np.int32) - lengths,
            wanted,
            depth,
            parameters_of(rows, numbers) if choice.races else (),
        )
        if (chains := network.chains(given)) is None:
            return None
        places = [(row.slot, row.most, row.mapped) for row in rows]
        return cls(coming, places, parts, depth, version, network, chains, choice, stop_below)

    @property
    def arrays(self) -> Sequence[NDArray[Any]]:
        return self._chains.arrays

    @property
    def slots(self) -> Sequence[int]:
        return [slot for slot, _, _ in self.places]

    def launch(self, columns: Sequence[Tensor], features: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        begin = end = 0
        for each, waiting in zip(self.coming, self.parts, strict=True):
            if waiting or each.batch_row != end:  # rows that follow each other are one piece
                found += [features[begin:end]] if end > begin else []
                found += waiting
                begin = each.batch_row
            end = each.batch_row + each.known + len(each.drafts)
        found.append(features[begin:end])
        self.parts = []
        hidden = self._network.fuse(found[0] if len(found) == 1 else torch.cat(found))
        return self._chains.make(columns, samples, hidden, self._choice)

    def tell(self, told: NDArray[np.int32]) -> None:
        self.found = told.reshape(self.depth, len(self.coming), 3)

    def chain(self, place: int) -> Sequence[int]:
        assert self.found is not None, "nobody has told yet"
        tokens: list[int] = self.found[:, place, 0].tolist()
        return tokens

    def proposal(self, place: int, row: DraftRow) -> Proposal | None:
        """For a row that has got its tokens. Draft tokens after the one at which a chain should stop are left out."""
        if self.found is None:
            return None
        tokens, (_, most, mapped) = self.chain(place), self.places[place]
        likely = np.ascontiguousarray(self.found[:, place, 1:]).view(np.float64)[:, 0].tolist()
        draft = Draft(row, 0)
        # Where the device has gone on: as many as are wanted, as far as there were blocks.
        for node in range(max(0, min(most - 1, mapped - row.length + 1)) + 1):
            if likely[node] > 0:
                draft.add(node - 1, [tokens[node]], [likely[node]])
            if likely[node] <= 0 or draft.chance[node] < self.stop_below:
                break
        return replace(draft.proposal(), version=self.version)


@dataclass(slots=True)
class Shown:
    """A row's place in chains: what the step computes of it the head sees by itself."""

    ahead: Ahead
    place: int
    is_over: bool = False
    """Whether the step was read."""

    def proposal(self, row: DraftRow) -> Proposal | None:
        return self.ahead.proposal(self.place, row)


def _at_least(count: int) -> int | None:
    return next((depth for depth in DEPTHS if depth >= count), None)
