"""The paged cache as panels, with the compiled attention over it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.kv_cache import AttentionPlan, CacheShape, DenseKVCache, bits
from slipstream.kernels.native.library import CACHE_FORMS, DTYPE_CODES, CAttention, address, c_batch, load


class NativeKVCache(DenseKVCache):
    """Groups of 16 tokens as panels per KV head; block_size must be a multiple of 16.

    Panels of 8 bits lie as those of the format that they are computed in.
    """

    @property
    def layers(self) -> Tensor:
        """[layers, 2 (keys, values), …]: for compiled code, which reads the layout; another tensor after a release."""
        return self._data

    @property
    def scales(self) -> Tensor | None:
        """[layers, 2, …] of these, likewise; None where there are none."""
        return self._scales if self.shape.has_scales else None

    def copy_cells(self, pairs: Sequence[tuple[int, int]]) -> None:
        (source, destination), layers = torch.tensor(pairs).T, len(self._data)
        kv_heads, head_dim = self.shape.kv_heads, self.shape.head_dim
        pair = 2 if _computed(self.shape) is torch.bfloat16 else 1
        # The layout of csrc/api.h: tokens are the columns of a K panel, and the reduction of the V panels.
        data = bits(self._data)
        keys = data[:, 0].view(layers, -1, kv_heads, head_dim // pair, 16, pair)
        values = data[:, 1].view(layers, -1, kv_heads, head_dim // 16, 16 // pair, 16, pair)
        there, here = (destination // 16, destination % 16), (source // 16, source % 16)
        keys[:, there[0], :, :, there[1]] = keys[:, here[0], :, :, here[1]]
        to, of = (there[1] // pair, there[1] % pair), (here[1] // pair, here[1] % pair)
        values[:, there[0], :, :, to[0], :, to[1]] = values[:, here[0], :, :, of[0], :, of[1]]
        if self.shape.has_scales:
            scales = self._scales.view(layers, 2, -1, kv_heads, 16)
            scales[:, :, there[0], :, there[1]] = scales[:, :, here[0], :, here[1]]

    def plan(self, batch: RaggedBatch) -> AttentionPlan:
        return _NativePlan(self._data, self._scales, self.shape, batch)


def _computed(shape: CacheShape) -> torch.dtype:
    """The format of panels that attention multiplies with."""
    if not shape.has_scales:
        return shape.dtype
    assert shape.compute is not None
    return shape.compute


class _NativePlan(AttentionPlan):
    def __init__(self, data: Tensor, scales: Tensor, shape: CacheShape, batch: RaggedBatch) -> None:
        library = load()
        assert library is not None
        self._library = library
        self._data, self._scales, self._shape, self._batch = data, scales, shape, batch
        self._c = c_batch(batch)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        settings = self._settings(layer, self._shape.kv_heads, 1.0, 0)
        k, v = k.float().contiguous(), v.float().contiguous()
        keys, values = self._data[layer]
        self._library.slip_store_kv(
            *(ctypes.byref(settings), ctypes.byref(self._c)),
            *(address(k), address(v), address(keys), address(values)),
        )

    def attend(
        self,
        layer: int,
        q: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        assert not softcap and sinks is None, "the compiled attention has neither"
        settings = self._settings(layer, q.shape[1], scale, window)
        wide = q.float().contiguous()
        out = torch.empty_like(wide)
        keys, values = self._data[layer]
        self._library.slip_attention(
            *(ctypes.byref(settings), ctypes.byref(self._c)),
            *(address(wide), address(keys), address(values), address(out)),
        )
        return out.to(q.dtype)

    def _settings(self, layer: int, heads: int, scale: float, window: int) -> CAttention:
        shape = self._shape
        scales: tuple[int | None, int | None] = (None, None)
        if shape.has_scales:
            keys, values = self._scales[layer]
            scales = address(keys), address(values)
        return CAttention(
            *(DTYPE_CODES[_computed(shape)], heads, shape.kv_heads, shape.head_dim, window, scale),
            *(CACHE_FORMS.get(shape.dtype, 0), 0, *scales),
        )
