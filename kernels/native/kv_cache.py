"""The paged cache as panels, with the compiled attention over it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.native.library import DTYPE_CODES, CAttention, address, c_batch, load


class NativeKVCache(PagedKVCache):
    """Groups of 16 tokens as panels per KV head; block_size must be a multiple of 16."""

    def copy_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        (source, destination), layers = torch.tensor(pairs).T, len(self.data)
        pair = 2 if self.data.dtype is torch.bfloat16 else 1
        # The layout of csrc/api.h: tokens are the columns of a K panel, and the reduction of the V panels.
        keys = self.data[:, 0].view(layers, -1, self.kv_heads, self.head_dim // pair, 16, pair)
        values = self.data[:, 1].view(layers, -1, self.kv_heads, self.head_dim // 16, 16 // pair, 16, pair)
        there, here = (destination // 16, destination % 16), (source // 16, source % 16)
        keys[:, there[0], :, :, there[1]] = keys[:, here[0], :, :, here[1]]
        to, of = (there[1] // pair, there[1] % pair), (here[1] // pair, here[1] % pair)
        values[:, there[0], :, :, to[0], :, to[1]] = values[:, here[0], :, :, of[0], :, of[1]]

    def store(self, layer: int, k: Tensor, v: Tensor, batch: RaggedBatch) -> None:
        library, shape, c = load(), self._shape(self.kv_heads, 1.0, 0), c_batch(batch)
        assert library is not None
        k, v = k.float().contiguous(), v.float().contiguous()
        keys, values = self.data[layer]
        library.slip_store_kv(
            ctypes.byref(shape), ctypes.byref(c), address(k), address(v), address(keys), address(values)
        )

    def attend(
        self, layer: int, q: Tensor, batch: RaggedBatch, scale: float, window: int = 0, softcap: float = 0.0
    ) -> Tensor:
        assert not softcap, "the compiled attention has no softcap"
        library, shape, c = load(), self._shape(q.shape[1], scale, window), c_batch(batch)
        assert library is not None
        wide = q.float().contiguous()
        out = torch.empty_like(wide)
        keys, values = self.data[layer]
        library.slip_attention(
            ctypes.byref(shape), ctypes.byref(c), address(wide), address(keys), address(values), address(out)
        )
        return out.to(q.dtype)

    def _shape(self, heads: int, scale: float, window: int) -> CAttention:
        return CAttention(DTYPE_CODES[self.data.dtype], heads, self.kv_heads, self.head_dim, window, scale)
