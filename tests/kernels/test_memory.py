"""Memory that is reserved costs nothing before it is written to."""

import psutil
import pytest
import torch

from slipstream.kernels.kv_cache import CacheShape, TorchKVCache
from slipstream.kernels.memory import reserved_zeros

SIZE = 256 << 20
LITTLE = 16 << 20


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("piece", [4096, SIZE])
def test_zeros_take_memory_when_they_are_written(piece: int) -> None:
    before = resident()
    zeros = reserved_zeros((2, SIZE // 4), torch.bfloat16, piece)
    assert zeros.shape == (2, SIZE // 4) and resident() - before < LITTLE
    zeros[1] = 1
    # The system may take back a little of what else the process has.
    assert SIZE // 2 - LITTLE < resident() - before < SIZE // 2 + LITTLE
    assert not zeros[0, ::1024].any()
    del zeros
    assert resident() - before < LITTLE


def test_blocks_that_nobody_has_had_take_no_memory() -> None:
    shape = CacheShape(num_layers=4, kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32)
    before = resident()
    cache = TorchKVCache(shape, SIZE // TorchKVCache.block_bytes(shape), torch.device("cpu"))
    assert cache.num_bytes > SIZE - LITTLE and resident() - before < LITTLE
    cache.copy_blocks([(0, 1)])
    assert resident() - before < 2 * LITTLE
    cache.release()
    assert resident() - before < LITTLE


def test_a_cache_without_blocks() -> None:
    assert reserved_zeros((3, 0), torch.float32, 0).shape == (3, 0)
