"""Names for the content of blocks: a block's hash covers its tokens and everything before them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from slipstream.engine.scheduling.kv.pool import BlockHash

DIGEST_BYTES = 16


def seed(weights: int, cache_salt: str = "", tenant: str = "", drafter: str = "", adapter: str = "") -> BlockHash:
    """The root of every chain. Blocks of other weights, another salt or tenant cannot match, by construction.

    ``weights`` counts how often the target's have changed: versions are named by whoever sends them, perhaps twice.

    Nor can those in which another learned drafter keeps its states than the one that ``drafter`` names, or those that
    were computed with another adapter.
    """
    # The repr of a tuple tells where one text ends and the next begins, whatever they contain.
    return blake2b(repr((weights, cache_salt, tenant, drafter, adapter)).encode(), digest_size=DIGEST_BYTES).digest()


def extend(chain: list[BlockHash], root: BlockHash, tokens: Sequence[int], block_size: int) -> None:
    """Appends the hashes of the full blocks of ``tokens`` that the chain does not cover yet."""
    parent = chain[-1] if chain else root
    for begin in range(len(chain) * block_size, len(tokens) - block_size + 1, block_size):
        content = array("i", tokens[begin : begin + block_size]).tobytes()
        parent = blake2b(parent + content, digest_size=DIGEST_BYTES).digest()
        chain.append(parent)


def outgrown(root: BlockHash) -> BlockHash:
    """The root for sequences that the model computes in another way because of their length."""
    return blake2b(root + b"outgrown", digest_size=DIGEST_BYTES).digest()
