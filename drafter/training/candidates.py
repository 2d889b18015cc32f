"""Tokens that a step of training tells apart: some of the draft vocabulary stand for all of it.

Scores of 8,192 draft tokens were a third of a training step's arithmetic, for a sum over all of them in the loss. With
all tokens that are to be drafted anywhere in the part, and a random sample of the others that counts for all others,
that sum is right on average (Jean et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 2048
LEAST_OTHERS = 256


@dataclass(frozen=True, slots=True)
class Candidates:
    """Columns of the draft vocabulary."""

    columns: Tensor
    """[n] int64."""
    bias: Tensor
    """[n] float32, added to their scores: the logarithm of how many columns each of them stands for."""
    place: Tensor
    """[draft vocabulary + 1] int64: where each column stands among them; -1 for others, and at the end."""


def choose(targets: Sequence[Tensor], size: int, seed: int, most: int = MOST) -> Candidates | None:
    """All targets (columns; -1: none) and some of the other columns, chosen by ``seed``; None if that is nearly all.

    ``size`` is the number of columns.
    """
    device = targets[0].device
    is_seen = torch.zeros(size, dtype=torch.bool, device=device)
    for each in targets:
        is_seen[each[each >= 0]] = True
    seen, others = is_seen.nonzero().flatten(), (~is_seen).nonzero().flatten()
    count = max(most - len(seen), LEAST_OTHERS)
    if len(seen) + count >= size // 2:
        return None
    # The same ones on any device.
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    chosen = others[order[:count].to(device)]
    columns = torch.cat((seen, chosen))
    bias = torch.zeros(len(columns), device=device)
    bias[len(seen) :] = math.log(len(others) / count)
    place = torch.full((size + 1,), -1, device=device)
    place[columns] = torch.arange(len(columns), device=device)
    return Candidates(columns, bias, place)
