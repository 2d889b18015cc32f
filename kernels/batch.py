"""The shape of every forward pass: a ragged batch of segments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Int32 = NDArray[np.int32]
NO_MIRRORS: Int32 = np.empty((0, 3), np.int32)


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Segments of sequences laid end to end; prefill, decode and verification differ only in segment lengths.

    Segment s holds the tokens ``q_start[s] : q_start[s + 1]`` and ends its sequence for now: with them the sequence
    is ``kv_len[s]`` tokens long, so the last one has position ``kv_len[s] - 1``. Row ``table_row[s]`` of
    ``block_tables`` maps the sequence's blocks to cache blocks; every block below ``kv_len[s]`` must be mapped.
    A mirror is a place in the cache (batch row, cache block, offset in it) where that row's keys and values are stored
    too, before attention: so a segment can read what another one of the same batch computes.
    ``known`` is how long the sequence is as far as its tokens are known, later chunks of its prompt included: what
    models go by that compute long sequences in another way than short ones. All arrays are C-contiguous int32.
    Columns are further arrays, of any numbers, that the step needs where the model runs; they travel with the batch
    (``Forward``).
    ``adapters`` name the one that each token is computed with: numbers of ``Stack.use_adapters`` from 1 on, 0 for none.
    A token id below 0 is one that the host does not know yet: -1 - i stands for ``latest[i]``, where the model runs.
    Nor does it know, with ``missed``, how many draft tokens of the step before were wrong: a segment is as many places
    further back as ``missed`` has at ``whose[s]``, and ends at ``kv_len`` at most.
    """

    token_ids: Int32  # [num_tokens]
    q_start: Int32  # [num_segments + 1]
    kv_len: Int32  # [num_segments]
    block_tables: Int32  # [rows, max_blocks]
    table_row: Int32  # [num_segments]
    block_size: int
    known: Int32  # [num_segments]
    mirrors: Int32 = field(default_factory=lambda: NO_MIRRORS)  # [num_mirrors, 3]
    columns: tuple[NDArray[Any], ...] = ()
    latest: Tensor | None = None  # [slots] int32; always the same memory
    adapters: Int32 | None = None  # [num_tokens]; None where no token has any
    missed: Tensor | None = None  # int32; always the same memory
    whose: Int32 | None = None  # [num_segments]; None without ``missed``

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_segments(self) -> int:
        return int(self.kv_len.shape[0])

    @property
    def positions(self) -> Int32:
        """[num_tokens] of the tokens in their sequences; compiled code derives them itself."""
        offset = np.repeat(self.kv_len - self.q_start[1:], np.diff(self.q_start))
        return (np.arange(self.num_tokens, dtype=np.int32) + offset).astype(np.int32)


def make_batch(
    token_ids: Int32,
    num_new: Int32,
    kv_len: Int32,
    block_tables: Int32,
    table_row: Int32,
    block_size: int,
    mirrors: Int32 = NO_MIRRORS,
    known: Int32 | None = None,
    columns: tuple[NDArray[Any], ...] = (),
    latest: Tensor | None = None,
    adapters: Int32 | None = None,
    missed: Tensor | None = None,
    whose: Int32 | None = None,
) -> RaggedBatch:
    """Derives starts from the tokens per segment and the lengths after them (both [num_segments]).

    Without ``known``, sequences are known up to where they end in this batch.
    """
    q_start = np.zeros(len(num_new) + 1, np.int32)
    np.cumsum(num_new, out=q_start[1:])
    known = kv_len if known is None else known
    return RaggedBatch(
        *(token_ids, q_start, kv_len, block_tables, table_row, block_size, known),
        *(mirrors, columns, latest, adapters, missed, whose),
    )
