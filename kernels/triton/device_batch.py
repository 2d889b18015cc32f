"""A ragged batch on the device, as kernels read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """The arrays of a ``RaggedBatch`` as tensors, int32 and contiguous, with room that kernels skip.

    There may be more tokens and segments than the batch has: such segments start at the last one's end, so that they
    have no tokens, and their ``kv_len`` is 0; such tokens belong to no segment, and mirrors of token -1 are none.
    ``positions`` and ``cells`` are worked out on the device, once per step.
    """

    token_ids: Tensor  # [tokens]; 0 where there is no token
    q_start: Tensor  # [segments + 1]
    kv_len: Tensor  # [segments]
    table_row: Tensor  # [segments]
    mirrors: Tensor  # [mirrors, 3]: token, cache block, offset in it
    block_tables: Tensor  # [rows, blocks]; the device's own copy, which outlives the batch
    positions: Tensor  # [tokens]; 0 where there is no token
    cells: Tensor  # [tokens]: where keys and values of each token are stored; -1 where there is no token
    block_size: int
    latest: Tensor | None = None  # [slots]: what ids below 0 stand for, see ``RaggedBatch``
    adapters: Tensor | None = None  # [tokens]: number of the adapter of each, 0 for none; None where no token has any
    missed: Tensor | None = None  # by how much sequences are shorter than ``kv_len``, see ``RaggedBatch``
    whose: Tensor | None = None  # [segments]

    def settled(self) -> DeviceBatch:
        """With the lengths that sequences have by now."""
        if self.missed is None or self.whose is None:
            return self
        return replace(self, kv_len=self.kv_len - self.missed.index_select(0, self.whose))

    @property
    def num_tokens(self) -> int:
        """Room for tokens."""
        return int(self.token_ids.shape[0])

    @property
    def num_segments(self) -> int:
        """Room for segments."""
        return int(self.kv_len.shape[0])
