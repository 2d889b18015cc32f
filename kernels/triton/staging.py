"""A step's arrays on their way to the device: side by side in one piece of memory, so that one copy takes all of them.

Every copy from the host costs some ten microseconds, however small it is, and a step has dozens of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.kernels.batch import Int32, RaggedBatch

Array = NDArray[Any]
ALIGNMENT = 64
"""Bytes: kernels are compiled for how pointers align, and each alignment is another compilation."""
TURNS = 3
"""Steps whose copies may be under way at once."""
LEAST_BYTES = 1 << 16
TYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def places(sizes: Sequence[int]) -> list[int]:
    """Offsets of pieces of so many bytes, each aligned; one more than there are pieces, the last for the end."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return found


def packed(arrays: Sequence[Array]) -> Int32:
    """The arrays as one, which travels like a column; there ``views`` takes it apart."""
    offsets = places([array.nbytes for array in arrays])
    piece = np.zeros(offsets[-1], np.uint8)
    _fill(piece, arrays, offsets)
    return piece.view(np.int32)


def views(slab: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """Arrays of these types and shapes that lie side by side in a slab [bytes] uint8 on the device."""
    found = []
    for array, offset in zip(arrays, places([array.nbytes for array in arrays]), strict=False):
        part = slab[offset : offset + array.nbytes].view(TYPES[array.dtype])
        found.append(part.view(array.shape))
    return found


def _fill(piece: NDArray[np.uint8], arrays: Sequence[Array], offsets: Sequence[int]) -> None:
    for array, offset in zip(arrays, offsets, strict=False):
        piece[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Staging:
    """Copies arrays to one device, several at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_apart = device.type == "cuda"
        self._buffers = [self._made(LEAST_BYTES) for _ in range(TURNS)]
        self._copied: list[torch.cuda.Event | None] = [None] * TURNS
        self._turn = 0

    def send(self, arrays: Sequence[Array], slab: Tensor | None = None) -> list[Tensor]:
        """The arrays on the device, as views of the slab; one copy, which later work on the stream waits for.

        Args:
            arrays: int32, int64, float32 or float64.
            slab: [bytes] uint8 to copy to, large enough: the tensors are where they were at the last call that had
                arrays of the same sizes. Without it, new memory.
        """
        offsets = places([array.nbytes for array in arrays])
        total = offsets[-1]
        if slab is None:
            slab = torch.empty(max(total, ALIGNMENT), dtype=torch.uint8, device=self._device)
        elif total > len(slab):
            raise ValueError(f"a slab of {len(slab)} bytes for {total} bytes")
        if total:
            host, piece = self._next(total)
            _fill(piece, arrays, offsets)
            slab[:total].copy_(host[:total], non_blocking=True)
            self._under_way()
        return views(slab, arrays)

    def _next(self, size: int) -> tuple[Tensor, NDArray[np.uint8]]:
        """Memory of the host that no copy reads any more, in two views."""
        self._turn = (self._turn + 1) % TURNS
        if (event := self._copied[self._turn]) is not None:
            event.synchronize()  # three steps ago, so it is over
        if size > len(self._buffers[self._turn][0]):
            self._buffers[self._turn] = self._made(2 * size)
        return self._buffers[self._turn]

    def _made(self, size: int) -> tuple[Tensor, NDArray[np.uint8]]:
        made = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_apart)
        return made, made.numpy()

    def _under_way(self) -> None:
        if self._is_apart:
            event = self._copied[self._turn] = torch.cuda.Event()
            event.record()


class TableMirror:
    """The device's copy of a table of blocks, which learns what has changed of the rows that a step reads."""

    def __init__(self, tables: Int32, device: torch.device) -> None:
        self.host = tables
        self.tables = torch.zeros(tables.shape, dtype=torch.int32, device=device)
        self._known = np.full_like(tables, -1)

    def changes(self, batch: RaggedBatch) -> Int32:
        """[n, 3]: row, column and block of each entry that the batch may read and the device does not know."""
        rows = np.unique(batch.table_row)
        width = -(-int(batch.kv_len.max(initial=0)) // batch.block_size)
        now = self.host[rows, :width]
        at, column = (now != self._known[rows, :width]).nonzero()
        return np.stack((rows[at], column, now[at, column]), axis=1).astype(np.int32)

    def told(self, changes: Int32) -> None:
        """These changes are on their way to the device."""
        self._known[changes[:, 0], changes[:, 1]] = changes[:, 2]
