"""Drafting token by token with a network that has a paged cache of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.speculation.protocol import Drafter, DraftHost, DraftRow, Proposal
from slipstream.kernels.batch import Int32, RaggedBatch, make_batch

EVIDENCE_BORDERS = (0.15, 0.3, 0.5, 0.7, 0.9)
"""Least probability of the first guess for each level of evidence but the lowest."""


class ChainDrafter(Drafter):
    """Takes the network's most likely token, feeds it back, and so on.

    The network's keys and values lie in the same blocks as the target's, so room, prefix hits and eviction are decided
    once. What it wrote for guesses is overwritten when it catches up. Where it was not asked for a while, or a cached
    block was filled without it, its keys and values are old or missing; that costs acceptance, never correctness.
    """

    num_evidence = len(EVIDENCE_BORDERS) + 1
    costly = True

    def __init__(self, stop_below: float = 0.05) -> None:
        """A draft ends where the probability that all of it is right falls below ``stop_below``.

        This is the threshold rule of SpecDec++ (Huang et al. 2024) with the network's own probabilities.
        """
        self._stop_below = stop_below
        self._host: DraftHost

    def attach(self, host: DraftHost) -> None:
        self._host = host

    @abstractmethod
    def _is_ready(self, row: DraftRow) -> bool:
        """Whether the network can guess after the last known token now."""

    @abstractmethod
    def _catch_up(self, rows: Sequence[DraftRow]) -> Tensor:
        """Shows the network what is known and new; its output after the last known token, [rows, hidden]."""

    @abstractmethod
    def _advance(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        """Its output after one guess more per row; ``hidden`` is the output before."""

    @abstractmethod
    def _scores(self, hidden: Tensor) -> Tensor:
        """Logits of what it can guess [rows, n] float32."""

    @abstractmethod
    def _tokens(self, choices: Int32) -> Int32:
        """The target's tokens of positions in ``_scores``."""

    @abstractmethod
    def _position(self, row: DraftRow) -> int:
        """Where the network's cache takes the first guess."""

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        proposals: list[Proposal | None] = [None] * len(rows)
        live = [i for i, row in enumerate(rows) if self._is_ready(row)]
        if not live:
            return proposals
        hidden = self._catch_up([rows[i] for i in live])
        drafts: dict[int, list[int]] = {i: [] for i in live}
        first: dict[int, float] = {}
        chance = np.ones(len(live))
        for depth in range(max(rows[i].most for i in live)):
            likely, guesses = self._most_likely(hidden)
            chance = chance * likely
            for i, guess, probability in zip(live, guesses, likely, strict=True):
                drafts[i].append(int(guess))
                first.setdefault(i, float(probability))
            goes_on = [
                at
                for at, i in enumerate(live)
                if depth + 1 < rows[i].most
                and self._position(rows[i]) + depth < rows[i].mapped
                and chance[at] >= self._stop_below
            ]
            if not goes_on:
                break
            live, chance = [live[at] for at in goes_on], chance[goes_on]
            ends = np.array([self._position(rows[i]) + depth + 1 for i in live], np.int32)
            batch = self._batch([rows[i] for i in live], guesses[goes_on], np.ones(len(live), np.int32), ends)
            hidden = self._advance(batch, hidden[goes_on])
        for i, draft in drafts.items():
            proposals[i] = Proposal(draft, sum(first[i] >= border for border in EVIDENCE_BORDERS))
        return proposals

    def _batch(self, rows: Sequence[DraftRow], ids: Int32, counts: Int32, ends: Int32) -> RaggedBatch:
        slots = np.array([row.slot for row in rows], np.int32)
        return make_batch(ids, counts, ends, self._host.block_tables, slots, self._host.block_size)

    def _most_likely(self, hidden: Tensor) -> tuple[NDArray[np.float64], Int32]:
        """Probability and token of the best guess of each row."""
        scores = self._scores(hidden)
        best = scores.max(dim=-1)
        likely = (best.values - torch.logsumexp(scores, -1)).exp()
        return likely.double().cpu().numpy(), self._tokens(best.indices.int().cpu().numpy())
