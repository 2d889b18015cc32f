"""Chains of draft tokens of sequences that the host knows; behind a step that it has not read yet: ``ChainInputs``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.kernels.batch import Int32


@dataclass(frozen=True, slots=True)
class HostChains:
    """What they are made with. Arrays have an entry per sequence, and are C-contiguous.

    A token is the most likely one where the temperature is 0, else the first of a race (``ops.race``).
    """

    block_tables: Int32  # [rows, max_blocks]
    table_row: Int32
    block_size: int
    starts: Int32
    """Positions that the first draft tokens take."""
    mapped: Int32
    """Positions that have a block: a token without one is not fed back."""
    most: Int32
    """Tokens at most, 1 at least."""
    stop_below: float
    """A chain ends where the product of its tokens' probabilities is less."""
    vocabulary: Tensor | None
    """[columns of the logits] int32, the token that each stands for; None: the column itself."""
    filters: tuple[NDArray[np.float32], Int32, NDArray[np.float32], NDArray[np.float32]]
    """Temperature, top-k, min-p and top-p, as ``ops.distribution`` takes them."""
    seeds: NDArray[np.int64]
    indices: NDArray[np.int64]
    """Which token of its answer each sequence's first draft token is."""
    runners: int
    """So many of a race tell how probable each of them is: by their scores, …"""
    sharpness: float
    """… each to the power of this."""

    @property
    def depth(self) -> int:
        return int(self.most.max())


@dataclass(frozen=True, slots=True)
class MadeChains:
    tokens: Int32  # [sequences, depth]
    likely: NDArray[np.float64]  # [sequences, depth]
    """Probabilities of the tokens if those before them are right."""
    counts: Int32  # [sequences]
    """How many there are of each; what is behind them says nothing."""

    def of(self, sequence: int) -> tuple[list[int], list[float]]:
        """Tokens and their probabilities."""
        count = int(self.counts[sequence])
        return self.tokens[sequence, :count].tolist(), self.likely[sequence, :count].tolist()
