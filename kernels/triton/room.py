"""Memory that graphs read a batch from, and what a batch looks like there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.triton.cache import update_tables
from slipstream.kernels.triton.staging import Array, TableMirror, places

BESIDES_BYTES = 1 << 18
"""Room behind the batch for what else a step needs on the device: changes of tables, and columns."""


class Room:
    """Memory on the device that graphs of one number of tokens read their batch from."""

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = tokens
        batch = places([4 * tokens, 4 * (tokens + 1), 4 * tokens, 4 * tokens, 12 * tokens, 4 * tokens, 4 * tokens])[-1]
        self.slab = torch.zeros(batch + BESIDES_BYTES, dtype=torch.uint8, device=device)
        self.positions = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.cells = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(tokens, hidden, dtype=dtype, device=device)
        self.latest = torch.zeros(tokens, dtype=torch.int32, device=device)
        """Tokens that only the device knows, and how sequences go on after them: see ``TritonChains``."""
        self.ends = torch.zeros(tokens, 3, dtype=torch.int32, device=device)

    def has_room(self, arrays: Sequence[Array]) -> bool:
        return places([array.nbytes for array in arrays])[-1] <= len(self.slab)


def padded(batch: RaggedBatch, tokens: int) -> list[Array]:
    """Token ids, starts, lengths, rows of tables and mirrors, and adapters and whose segments are, if there are any,
    with room for so many tokens; see ``DeviceBatch``.
    """
    segments, mirrors = batch.num_segments, len(batch.mirrors)
    ids = np.zeros(tokens, np.int32)
    ids[: batch.num_tokens] = batch.token_ids
    starts = np.full(tokens + 1, batch.num_tokens, np.int32)
    starts[: segments + 1] = batch.q_start
    lengths, rows = np.zeros((2, tokens), np.int32)
    lengths[:segments], rows[:segments] = batch.kv_len, batch.table_row
    places_too = np.full((tokens, 3), -1, np.int32)
    places_too[:mirrors] = batch.mirrors
    found = [ids, starts, lengths, rows, places_too]
    if batch.adapters is not None:
        found.append(np.pad(batch.adapters, (0, tokens - batch.num_tokens)))
    if batch.missed is not None and batch.whose is not None:  # at the end of it nothing is missed
        found.append(np.pad(batch.whose, (0, tokens - segments), constant_values=len(batch.missed) - 1))
    return found


def update(mirror: TableMirror, changed: Tensor, changes: Int32) -> None:
    """Changes a table on the device: ``changed`` there, ``changes`` on the host."""
    if len(changes):
        update_tables(mirror.tables, changed)
        mirror.told(changes)
