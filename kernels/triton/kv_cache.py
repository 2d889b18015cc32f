"""The paged cache of GPUs, with attention in Triton or by another backend; tokens lie as in ``TorchKVCache``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.attention.backend import AttentionBackend, Step, StepAttention
from slipstream.kernels.attention.choice import covers
from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.kv_cache import AttentionPlan, CacheShape, TorchKVCache
from slipstream.kernels.readback import sent
from slipstream.kernels.triton import cache
from slipstream.kernels.triton.attention import LONGEST_ROWS, attention
from slipstream.kernels.triton.cache import Rotation
from slipstream.kernels.triton.device_batch import DeviceBatch


class TritonKVCache(TorchKVCache):
    """Keys and values in float32, bfloat16, float16, int8 or, from compute capability 8.9 on, float8_e4m3fn."""

    def __init__(
        self,
        shape: CacheShape,
        num_blocks: int,
        device: torch.device,
        attention: AttentionBackend | None = None,
        prompt: bool = False,
    ) -> None:
        """``attention`` computes what it covers, Triton the rest; by default everything.

        ``prompt``: whether ``plan`` may compute long segments as prompts, whose bits are others.
        """
        super().__init__(shape, num_blocks, device)
        self._attention, self._prompt = attention, prompt

    @property
    def is_recordable(self) -> bool:
        """Whether plans may be captured in graphs; other backends than Triton are planned on the host for each step."""
        return self._attention is None

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.copy_blocks_on_device(self._staged(pairs))

    def copy_cells(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.copy_cells_on_device(self._staged(pairs))

    def copy_blocks_on_device(self, pairs: Tensor) -> None:
        """``copy_blocks`` for pairs [n, 2] int32 on the device, where a source of -1 is none.

        No destination is a source as well.
        """
        self._copy_rows(self.num_blocks, pairs)

    def copy_cells_on_device(self, pairs: Tensor) -> None:
        """``copy_cells`` for pairs [n, 2] int32 on the device, as ``copy_blocks_on_device``."""
        self._copy_rows(self.num_blocks * self.shape.block_size, pairs)

    def _copy_rows(self, rows: int, pairs: Tensor) -> None:
        for each in (self._data, self._scales)[: 1 + self.shape.has_scales]:
            cache.copy_rows(each.view(len(each), 2, rows, -1), pairs)

    def plan(self, batch: RaggedBatch) -> AttentionPlan:
        """Without ``prompt``, all segments are computed as rows: bits do not depend on how a sequence is cut."""
        tokens = np.zeros((2, batch.num_tokens), np.int32)
        arrays = (batch.token_ids, batch.q_start, batch.kv_len, batch.table_row, batch.mirrors, batch.block_tables)
        ids, starts, lengths, rows, mirrors, tables, positions, cells = (
            torch.from_numpy(array).to(self.device) for array in (*arrays, *tokens)
        )
        on_device = DeviceBatch(*(ids, starts, lengths, rows, mirrors, tables, positions, cells, batch.block_size))
        cache.place(on_device)
        return self.plan_on_device(on_device, int(batch.kv_len.max()), self._prompt, host=batch)

    def plan_on_device(
        self,
        batch: DeviceBatch,
        max_context: int,
        prompt: bool,
        row_tokens: int | None = None,
        host: RaggedBatch | None = None,
    ) -> TritonPlan:
        """A plan for a batch that is placed, or will be before the plan is used.

        ``max_context``, ``prompt`` and ``row_tokens`` as in ``attention``. The plan may be captured in a graph, and
        replayed with other contents of the batch's tensors. Other backends compute only where they are given the batch
        as the ``host`` made it, and no such plan; by it, nothing is launched for rows where there are only prompts.
        """
        if prompt and host is not None and row_tokens is None:
            is_short = np.diff(host.q_start) <= LONGEST_ROWS
            prompt = not bool(is_short.all())
            row_tokens = int(host.q_start[1:][is_short].max(initial=0))
            max_context = int(host.kv_len[is_short].max(initial=1))
        other = None
        if host is not None and self._attention is not None:
            other = self._attention.name, self._attention.plan(Step(host, batch, self.shape))
        return TritonPlan(self._data, self._scales, self.shape, batch, max_context, prompt, row_tokens, other)

    def _staged(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        return sent(np.array(pairs, np.int32).reshape(-1, 2), self.device)


class TritonPlan(AttentionPlan):
    """Attention over a batch on the device."""

    def __init__(
        self,
        data: Tensor,
        scales: Tensor,
        shape: CacheShape,
        batch: DeviceBatch,
        max_context: int,
        prompt: bool,
        row_tokens: int | None,
        other: tuple[str, StepAttention] | None = None,
    ) -> None:
        """``other``: what computes attention instead, with its name, where it covers it."""
        self._cells = data.view(len(data), 2, -1, shape.kv_heads, shape.head_dim)
        self._block_size, self._other = shape.block_size, other
        self._scales = scales if shape.has_scales else None
        self._batch = batch
        self._max_context, self._prompt, self._row_tokens = max_context, prompt, row_tokens

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values = self._cells[layer]
        cache.store(self._batch, k, v, keys, values, self._scales_of(layer))

    def rotate_and_store(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> None:
        """Rotates q in place, and stores k rotated, and v; the three may be parts of one tensor."""
        keys, values = self._cells[layer]
        cache.store(self._batch, k, v, keys, values, self._scales_of(layer), q, rotation)

    def attend(
        self,
        layer: int,
        q: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        keys, values = self._cells[layer]
        if self._other is not None:
            name, other = self._other
            if covers(name, bool(window), bool(softcap), sinks is not None):
                keys, values = (x.unflatten(0, (-1, self._block_size)) for x in (keys, values))
                return other.attend(q, keys, values, scale, window, softcap, sinks)
        return attention(
            *(q, keys, values, self._batch, scale),
            max_context=self._max_context,
            window=window,
            softcap=softcap,
            sinks=sinks,
            scales=self._scales_of(layer),
            prompt=self._prompt,
            row_tokens=self._row_tokens,
        )

    def _scales_of(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Those of keys and of values; a layer's begin at a multiple of 16 bytes, as kernels are compiled for."""
        return None if self._scales is None else (self._scales[layer, 0], self._scales[layer, 1])
