"""Gives requests their blocks: prefix hits, growth, copies on write, release."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from slipstream.engine.scheduling.kv import prefix
from slipstream.engine.scheduling.kv.pool import BlockHash, BlockPool
from slipstream.engine.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class Admission:
    """What admitting a request did."""

    num_cached: int
    """Tokens whose keys and values are reused."""
    copies: tuple[tuple[int, int], ...]
    """Blocks to copy before the step, (source, destination)."""


class Wait(Enum):
    """Why a request cannot be admitted yet."""

    BLOCKS = "too few blocks are available"
    PREFIX = "another request is about to compute the same beginning"


class KVManager:
    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._coming: dict[BlockHash, Request] = {}
        """Blocks that an admitted request will compute: others with the same beginning wait for them."""

    def admit(self, request: Request, spare: int) -> Admission | Wait:
        """Takes blocks for all known tokens, reusing what is cached, if ``spare`` blocks stay available besides.

        Changes nothing when the answer is to wait.
        """
        block_size, pool = self.block_size, self.pool
        if self._is_coming(request.awaited, request):
            return Wait.PREFIX
        useful = self._useful(request)
        hits = self._hits(useful)
        if len(hits) < len(useful) and self._is_coming(useful[len(hits)], request):
            request.awaited = useful[len(hits)]
            return Wait.PREFIX
        total = -(-len(request.tokens) // block_size)
        # The last token is always computed, for its logits. If its block is shared, it gets a copy to write to.
        whole = len(hits) * block_size == len(request.tokens)
        source = hits.pop() if whole else None
        idle = sum(map(pool.is_idle, hits))
        if total - len(hits) + idle + spare > pool.num_available:
            return Wait.BLOCKS
        for block in hits:
            pool.share(block)
        request.blocks = hits + [pool.allocate() for _ in range(total - len(hits))]
        request.num_published = len(hits)
        for content in request.block_hashes[len(hits) :]:
            self._coming.setdefault(content, request)
        if source is not None:
            return Admission(len(request.tokens) - 1, ((source, request.blocks[-1]),))
        return Admission(len(hits) * block_size, ())

    def grow(self, request: Request, length: int) -> int | None:
        """Makes room for ``length`` tokens; the number of blocks added, or None if there are too few."""
        missing = -(-length // self.block_size) - len(request.blocks)
        if missing > self.pool.num_available:
            return None
        for _ in range(missing):
            request.blocks.append(self.pool.allocate())
        return max(missing, 0)

    def publish(self, request: Request) -> None:
        """Makes blocks findable whose tokens are known and computed by the steps planned so far.

        Steps run in the order they are planned, so whoever finds the block reads it after it was written.
        """
        if not self._prefix_caching:
            return
        full = min(request.num_computed, len(request.tokens)) // self.block_size
        if full <= request.num_published:
            return
        prefix.extend(request.block_hashes, request.root, request.tokens, self.block_size)
        for index in range(request.num_published, full):
            content = request.block_hashes[index]
            self.pool.publish(request.blocks[index], content)
            if self._coming.get(content) is request:
                del self._coming[content]
        request.num_published = full

    def free(self, request: Request) -> None:
        """Gives all blocks back; the end of the sequence is the first to be evicted later."""
        for content in request.block_hashes[request.num_published :]:
            if self._coming.get(content) is request:
                del self._coming[content]
        for block in reversed(request.blocks):
            self.pool.release(block)
        request.blocks = []
        request.num_published = 0

    def reset(self) -> None:
        """Forgets the content of every block, so that nothing computed so far can be found again."""
        self.pool.forget_all()

    def _is_coming(self, content: BlockHash | None, request: Request) -> bool:
        """Whether somebody computes this block for whom the request may wait; for offline ones only their like do."""
        other = self._coming.get(content) if content is not None else None
        return other is not None and other.message.offline <= request.message.offline

    def _useful(self, request: Request) -> list[BlockHash]:
        """Names of the blocks of its beginning that it need not compute itself."""
        if not self._prefix_caching:
            return []
        prefix.extend(request.block_hashes, request.root, request.tokens, self.block_size)
        params = request.message.params
        if params.pooling == "mean":  # all positions count
            return []
        if params.prompt_logprobs is not None:  # the positions that tell them have to be computed
            return request.block_hashes[: max(params.prompt_logprobs_from - 1, 0) // self.block_size]
        return request.block_hashes

    def _hits(self, names: list[BlockHash]) -> list[int]:
        """Cached blocks, up to the first that is not cached."""
        hits = []
        for content in names:
            block = self.pool.find(content)
            if block is None:
                break
            hits.append(block)
        return hits
