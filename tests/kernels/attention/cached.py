"""Random sequences in a cache of any kind."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from slipstream.kernels.batch import RaggedBatch, make_batch
from slipstream.kernels.kv_cache import CacheShape, DenseKVCache, PagedKVCache, TorchKVCache
from slipstream.kernels.native import library
from slipstream.kernels.native.kv_cache import NativeKVCache

KINDS: list[Any] = [TorchKVCache] + ([NativeKVCache] if library.load() is not None else [])
ISAS = [name for name, runs in library.variants().items() if runs] or ["none"]
"""Compiled variants that this processor can run."""
CPU = torch.device("cpu")
F32, BF16, INT8, FP8 = torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn
Kept = tuple[torch.dtype, torch.dtype]
"""In which format keys and values are kept, and in which computed with."""
KEPT: list[Kept] = [(F32, F32), (BF16, BF16), (INT8, F32), (INT8, BF16), (FP8, F32), (FP8, BF16)]


def with_variants(kinds: list[Any]) -> Any:
    """Parametrises a test by ``isa`` and ``kind``: compiled caches with each variant, others once."""
    pairs = [(isa, kind) for isa in ISAS for kind in kinds if kind is NativeKVCache or isa == ISAS[-1]]
    return pytest.mark.parametrize(("isa", "kind"), pairs, indirect=["isa"], scope="module")


class Sequences:
    """Random sequences whose blocks lie scattered in the cache."""

    def __init__(
        self, lengths: list[int], heads: int, kv_heads: int, head_dim: int, block_size: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.block_size = lengths, block_size
        self.q = [torch.randn(length, heads, head_dim, generator=generator) for length in lengths]
        self.k = [torch.randn(length, kv_heads, head_dim, generator=generator) for length in lengths]
        self.v = [torch.randn(length, kv_heads, head_dim, generator=generator) for length in lengths]
        widest = max(-(-length // block_size) for length in lengths)
        self.num_blocks = widest * len(lengths) + 3
        blocks = rng.permutation(self.num_blocks)[: widest * len(lengths)]
        self.tables = blocks.reshape(len(lengths), widest).astype(np.int32)

    def batch(self, rows: list[int], starts: list[int], ends: list[int]) -> RaggedBatch:
        counts = np.array(ends, np.int32) - np.array(starts, np.int32)
        ids = np.zeros(int(counts.sum()), np.int32)
        return make_batch(ids, counts, np.array(ends, np.int32), self.tables, np.array(rows, np.int32), self.block_size)

    def run(
        self, cache: PagedKVCache, rows: list[int], starts: list[int], ends: list[int], window: int
    ) -> torch.Tensor:
        def cut(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([tensors[row][s:e] for row, s, e in zip(rows, starts, ends, strict=True)])

        plan = cache.plan(self.batch(rows, starts, ends))
        plan.store(0, cut(self.k), cut(self.v))
        return plan.attend(0, cut(self.q), 0.125, window)


def new_cache(kind: type[DenseKVCache], s: Sequences, kept: Kept) -> DenseKVCache:
    kv_heads, head_dim = s.k[0].shape[1:]
    return kind(CacheShape(1, s.block_size, kv_heads, head_dim, *kept), s.num_blocks, CPU)


shapes = st.sampled_from([(9, 3, 64), (4, 4, 32), (8, 1, 128), (40, 1, 32), (6, 2, 96), (2, 1, 256)])
