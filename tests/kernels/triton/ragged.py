"""Ragged batches on the device for the tests of kernels: sequences whose blocks lie scattered in a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.triton import launch
from slipstream.kernels.triton.device_batch import DeviceBatch

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")


def on_device(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def scattered_tables(lengths: Sequence[int], block_size: int, seed: int = 0) -> tuple[Tensor, int]:
    """Block tables of sequences that may get this long, and the number of blocks in the cache, some of them unused."""
    widest = max(-(-length // block_size) for length in lengths)
    num_blocks = widest * len(lengths) + 3
    blocks = np.random.default_rng(seed).permutation(num_blocks)[: widest * len(lengths)]
    return on_device(blocks.reshape(len(lengths), widest)), num_blocks


def device_batch(
    tables: Tensor,
    block_size: int,
    counts: Sequence[int],
    lengths: Sequence[int],
    rows: Sequence[int] | None = None,
    mirrors: Sequence[tuple[int, int, int]] = (),
    spare_tokens: int = 0,
    spare_segments: int = 0,
) -> DeviceBatch:
    """The last ``counts`` tokens of sequences of these lengths, with spare room; not yet placed.

    Positions and cells hold what an earlier batch may have left.
    """
    tokens = sum(counts) + spare_tokens
    q_start = np.cumsum([0, *counts, *[0] * spare_segments])
    rows = range(len(counts)) if rows is None else rows
    return DeviceBatch(
        token_ids=on_device([0] * tokens),
        q_start=on_device(q_start),
        kv_len=on_device([*lengths, *[0] * spare_segments]),
        table_row=on_device([*rows, *[0] * spare_segments]),
        mirrors=on_device(mirrors).view(-1, 3),
        block_tables=tables,
        positions=on_device([77] * tokens),
        cells=on_device([77] * tokens),
        block_size=block_size,
    )


def cells_of(tables: Tensor, block_size: int, row: int, length: int) -> Tensor:
    """Where the tokens of a sequence lie."""
    position = torch.arange(length, device=DEVICE)
    return tables[row, position // block_size].long() * block_size + position % block_size
