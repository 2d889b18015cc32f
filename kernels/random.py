"""Random numbers that depend on a key and a counter only, so that a stream is the same in any batch and any order.

The noise of a token is a number of the exponential distribution that belongs to a seed (the key), the index of the
token in its answer (the counter) and the token's id. It is made in two parts, so that whoever looks for the smallest
quotients of noise and weight needs little of it (``ops.race``). Of a block of 64 ids the *smallest* number is drawn
first, which is exponential with 64 times the rate, and which of the ids it falls to. What any other id of the block has
above that is exponential again, since the distribution has no memory. So all numbers are independent and exponential,
and one number bounds those of 64 ids from below.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

BLOCK = 64
"""Ids whose smallest noise is drawn together."""
LEAST, ABOVE = 1, 2
"""Streams: of the smallest noise of blocks, and of what the other ids of a block have above it."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox(key: UInt64, counter: UInt64, stream: int, place: UInt64) -> tuple[UInt64, UInt64, UInt64, UInt64]:
    """Philox-4x32-10 (Salmon et al. 2011), vectorised: four 32-bit words per key, counter and place (below 2^32).

    The arrays are broadcast against each other.
    """
    c0, c1 = counter & _LOW, counter >> _WORD
    c2, c3 = np.full_like(place, np.uint64(stream)), place
    k0, k1 = key & _LOW, key >> _WORD
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> _WORD) ^ c1 ^ k0, product1 & _LOW, (product0 >> _WORD) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def least(key: UInt64, counter: UInt64, block: Int64) -> tuple[Float64, Int64]:
    """The smallest noise of each block of ids, and which of its ids has it (0 … 63); arrays are broadcast."""
    high, low, third, _ = philox(key, counter, LEAST, block.astype(np.uint64))
    bits = (high << _WORD | low) >> np.uint64(12)
    # The number lies between 0 and 1, and so does what is left to 1; both are exact.
    smallest = -np.log(1.0 - (bits.astype(np.float64) + 0.5) * 2.0**-52) / BLOCK
    return smallest, (third % np.uint64(BLOCK)).astype(np.int64)


def exponential(key: UInt64, counter: UInt64, ids: Int64) -> Float64:
    """The noise of each id; arrays are broadcast."""
    block, place = ids // BLOCK, ids % BLOCK
    smallest, at = least(key, counter, block)
    # A call gives four words: lane l of a block those of its ids l, 16 + l, 32 + l and 48 + l.
    words = philox(key, counter, ABOVE, (block * 16 + place % 16).astype(np.uint64))
    word = np.choose(np.broadcast_to(place // 16, words[0].shape), words)
    above = -np.log(1.0 - (word.astype(np.float64) + 0.5) * 2.0**-32)
    return np.where(place == at, smallest, smallest + above)
