"""Memory for the features of running requests: pages of positions, all allocated at once, so that it is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE_POSITIONS = 64


class Track:
    """The features of one request: those of positions begin … end - 1."""

    __slots__ = ("begin", "end", "pages")

    def __init__(self) -> None:
        self.begin = self.end = 0
        self.pages: deque[int] = deque()
        """Page i holds positions from (begin // PAGE_POSITIONS + i) * PAGE_POSITIONS on."""


class FeaturePages:
    """One thread writes and another reads and frees what is written; each step is a single copy."""

    def __init__(self, num_bytes: int, taps: int, hidden: int) -> None:
        count = max(num_bytes // (PAGE_POSITIONS * taps * hidden * 2), 1)
        # Mapped to memory page by page, as it is first used.
        self._data = torch.empty(count * PAGE_POSITIONS, taps, hidden, dtype=torch.bfloat16)
        self._free = deque(range(count - 1, -1, -1))
        self.num_pages = count

    @property
    def num_free(self) -> int:
        return len(self._free)

    def extend(self, track: Track, count: int, most: int) -> list[int] | None:
        """Places for ``count`` positions more; then the track holds at most ``most``, up to a page.

        None if there is no room; the track is then as it was.
        """
        base = track.begin // PAGE_POSITIONS
        needed = -(-(track.end + count) // PAGE_POSITIONS) - base - len(track.pages)
        taken: list[int] = []
        for _ in range(needed):
            if not self._free:
                self._free.extend(taken)
                return None
            taken.append(self._free.pop())
        track.pages.extend(taken)
        places = []
        for position in range(track.end, track.end + count):
            page, offset = divmod(position, PAGE_POSITIONS)
            places.append(track.pages[page - base] * PAGE_POSITIONS + offset)
        track.end += count
        while (base + 1) * PAGE_POSITIONS <= track.end - most:
            self._free.append(track.pages.popleft())
            base += 1
            track.begin = base * PAGE_POSITIONS
        return places

    def write(self, places: Sequence[int], features: Sequence[Tensor]) -> None:
        """Features [positions, taps, hidden] of any float type and device, in pieces, to as many places."""
        rows = torch.cat(list(features)) if len(features) > 1 else features[0]
        self._data.index_copy_(0, torch.tensor(places), rows.to("cpu", torch.bfloat16))

    def read(self, track: Track, end: int) -> Tensor:
        """A copy of positions begin … end - 1."""
        base = track.begin // PAGE_POSITIONS
        starts = torch.tensor(list(track.pages), dtype=torch.long) * PAGE_POSITIONS
        rows = (starts[:, None] + torch.arange(PAGE_POSITIONS)).flatten()
        return self._data[rows[track.begin - base * PAGE_POSITIONS : end - base * PAGE_POSITIONS]]

    def release(self, track: Track) -> None:
        """Frees the pages of a track."""
        self._free.extend(track.pages)
        track.pages.clear()
        track.begin = track.end = 0
