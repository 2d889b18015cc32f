"""The blocks of the KV cache: who holds them, what they contain, and which goes next.

A block is in exactly one state: *used* (somebody holds a reference), *cached* (nobody does, but its content is known
by hash and may be found again), or *free*. Cached blocks are given up oldest first when free ones run out.
"""

from __future__ import annotations

from collections import OrderedDict

BlockHash = bytes


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._by_hash: dict[BlockHash, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def is_idle(self, block: int) -> bool:
        """Whether nobody holds the block, so that sharing it takes one from the available ones."""
        return self._references[block] == 0

    def allocate(self) -> int:
        """A block with one reference and no content; the oldest cached block is given up if none is free."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        assert self._references[block] > 0, f"block {block} was released more often than it was taken"
        self._references[block] -= 1
        if self._references[block] == 0:
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def publish(self, block: int, content: BlockHash) -> None:
        """Makes a full block findable. Of two blocks with equal content the first one stays the one that is found."""
        if content not in self._by_hash and self._hashes[block] is None:
            self._by_hash[content] = block
            self._hashes[block] = content

    def find(self, content: BlockHash) -> int | None:
        return self._by_hash.get(content)

    def forget_all(self) -> None:
        """Makes every block unfindable; held blocks stay with their holders."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._by_hash.clear()
        self._hashes = [None] * self.num_blocks

    def check(self, holders: list[list[int]]) -> None:
        """Raises AssertionError unless the books balance; ``holders`` are the block lists of all live requests."""
        counted = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counted[block] += 1
        assert counted == self._references, "reference counts differ from what requests hold"
        free, cached = set(self._free), set(self._cached)
        used = {block for block, references in enumerate(self._references) if references}
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert not free & cached and not free & used and not cached & used, "a block is in two states"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "free + cached + used != total"
        assert all(self._hashes[block] is None for block in free), "a free block is findable"
        assert all(self._hashes[block] is not None for block in cached), "a cached block cannot be found"
        for content, block in self._by_hash.items():
            assert self._hashes[block] == content, "the hash index points to a block of other content"

    def _forget(self, block: int) -> None:
        content = self._hashes[block]
        if content is not None:
            del self._by_hash[content]
            self._hashes[block] = None
