"""What a network's logits make a draft token of, and draft tokens a proposal."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.speculation.protocol import DraftRow, Proposal
from slipstream.kernels import ops

EVIDENCE_BORDERS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.9)
"""Least probability of a draft token for each level but the lowest.

A level has two numbers of evidence, for most likely tokens and, one higher, for those of a race: what is learned of the
ones says little of the others."""
RUNNERS = 8
"""Those of a race whose scores tell how likely each of them is to win the target's, too."""
SHARPNESS = 0.3
"""That probability is in proportion to the score to the power of this.

On the default model with the warm head this told right drafts from wrong ones best, and was right on average."""


@dataclass(slots=True)
class Draft:
    """A tree in the making; the lists have one entry per node."""

    row: DraftRow
    room: int
    """Scratch blocks it may take for branches."""
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    likely: list[float] = field(default_factory=list)
    """Probability of each draft token if those before it are right, as the network sees it."""
    chance: list[float] = field(default_factory=list)
    """Probability that they are all right."""

    def add(self, parent: int, tokens: Sequence[int], likely: Sequence[float]) -> None:
        before = self.chance[parent] if parent >= 0 else 1.0
        self.tokens += tokens
        self.parents += [parent] * len(tokens)
        self.likely += likely
        self.chance += [before * probability for probability in likely]

    def best(self) -> list[int]:
        """The most likely nodes, at most as many as are wanted, in falling order: each stands behind its parent."""
        return sorted(range(len(self.chance)), key=lambda node: -self.chance[node])[: self.row.most]

    def proposal(self) -> Proposal:
        nodes = self.best()
        place = {-1: -1} | {node: at for at, node in enumerate(nodes)}
        level = [sum(self.likely[node] >= border for border in EVIDENCE_BORDERS) for node in nodes]
        evidence = [2 * each + (self.row.params.temperature > 0) for each in level]
        return Proposal([self.tokens[i] for i in nodes], [place[self.parents[i]] for i in nodes], evidence)


def parameters_of(rows: Sequence[DraftRow], indices: Sequence[int]) -> tuple[NDArray[Any], ...]:
    """What rows draw these tokens of their answers with: the four parameters, seeds, and indices."""
    params = [row.params for row in rows]
    numbers = [(each.temperature, each.min_p, each.top_p) for each in params]
    temperature, min_p, top_p = np.ascontiguousarray(np.array(numbers, np.float32).T)
    seeds = np.array([row.seed for row in rows], np.uint64).view(np.int64)
    top_k = np.array([each.top_k for each in params], np.int32)
    return temperature, top_k, min_p, top_p, seeds, np.array(indices, np.int64)


def raced(scores: Tensor, parameters: Sequence[Tensor], width: int, vocabulary: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``AutoregressiveDrafter._race``."""
    *filters, seeds, indices = parameters
    weights = ops.distribution(scores, *filters)
    columns, wins = ops.race(weights, seeds, indices, max(width, RUNNERS), vocabulary)
    likely = wins.double() ** SHARPNESS
    likely /= likely.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return likely[:, :width], columns[:, :width].clamp(min=0)


@dataclass(frozen=True, slots=True)
class Choice:
    """The next draft token of each row, on the device."""

    vocabulary: Tensor | None
    races: bool
    """Whether a row draws; the columns are then the parameters of all."""

    @property
    def kind(self) -> Hashable:
        return self.races, id(self.vocabulary)

    def __call__(self, logits: Tensor, step: Tensor, columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        best, likely = ops.argmax_with_probability(logits)
        best, likely = best.clamp(min=0).long(), likely.double()
        if self.races:
            *filters, seeds, indices = columns
            wins, drawn = raced(logits, (*filters, seeds, indices + step), 1, self.vocabulary)
            draws = filters[0] > 0
            best, likely = torch.where(draws, drawn[:, 0], best), torch.where(draws, wins[:, 0], likely)
        tokens = (best if self.vocabulary is None else self.vocabulary.index_select(0, best)).int()
        return tokens, torch.cat((tokens[:, None], likely[:, None].view(torch.int32)), 1)
