"""Random numbers that depend on a key and a counter only, so that a stream is the same in any batch and any order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox(key: UInt64, counter: UInt64, stream: int) -> tuple[UInt64, UInt64, UInt64, UInt64]:
    """Philox-4x32-10 (Salmon et al. 2011), vectorised: four 32-bit words per key [n] and counter [n]."""
    c0, c1 = counter & _LOW, counter >> _WORD
    c2, c3 = np.full_like(counter, np.uint64(stream)), np.zeros_like(counter)
    k0, k1 = key & _LOW, key >> _WORD
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> _WORD) ^ c1 ^ k0, product1 & _LOW, (product0 >> _WORD) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(key: UInt64, counter: UInt64, stream: int = 0) -> NDArray[np.float64]:
    """One number in [0, 1) per key and counter (both [n]), with 53 random bits."""
    high, low, _, _ = philox(key, counter, stream)
    bits = (high << _WORD | low) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
