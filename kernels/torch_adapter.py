"""Low-rank adapters in plain torch, on any device: what they add to rows of a batch, which have one each or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels import ops
from slipstream.kernels.adapter import Adapter, LayerMatrices
from slipstream.kernels.batch import RaggedBatch


class TorchAdapter(Adapter):
    def __init__(self, layers: Iterable[LayerMatrices], dtype: torch.dtype, device: torch.device) -> None:
        self.layers = [
            {name: (a.to(device, dtype), b.to(device, dtype)) for name, (a, b) in layer.items()} for layer in layers
        ]
        """A and B of each layer, by the names that they came with."""


def runs_of(batch: RaggedBatch, adapters: Sequence[Adapter | None]) -> list[tuple[slice, TorchAdapter]]:
    """Tokens behind each other that have the same adapter; ``adapters`` by number, from 1 on."""
    if batch.adapters is None:
        return []
    edges = np.flatnonzero(np.diff(batch.adapters, prepend=-1, append=-1)).tolist()
    runs = []
    for begin, end in pairwise(edges):
        if number := int(batch.adapters[begin]):
            adapter = adapters[number - 1]
            assert isinstance(adapter, TorchAdapter)
            runs.append((slice(begin, end), adapter))
    return runs


def add_low_rank(x: Tensor, y: Tensor, added: Iterable[tuple[slice, tuple[Tensor, Tensor]]]) -> None:
    """Adds x A^T B^T of some rows of x [m, k] to those of y [m, n], in place."""
    for rows, (a, b) in added:
        y[rows] += ops.linear(ops.linear(x[rows].to(a.dtype), a), b).to(y.dtype)
