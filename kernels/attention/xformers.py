"""xFormers' attention over the paged cache: its split-K kernel, with a paged block-diagonal mask.

That kernel takes segments of equal length, so every token is a row of its own here, which sees the blocks of its
sequence up to itself: decode and verification. Segments that are longer stay with Triton's tiles of prompts, since each
of their tokens would read all keys once more.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.attention.backend import Step, StepAttention, UnavailableError

WIDEST_READ = 64
"""Keys that its kernel reads at once, at most; they have to lie in one block."""


class Backend:
    name: ClassVar[str] = "xformers"

    def __init__(self, library: Any = None) -> None:
        """``library`` is ``xformers.ops.fmha``; by default the one that is installed."""
        try:
            self.library = import_module("xformers.ops.fmha") if library is None else library
            self._kernel = self.library.triton_splitk.FwOp
            if not self._kernel.is_available():
                raise UnavailableError("xFormers is installed, but its Triton kernels do not run here")
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            raise UnavailableError(f"xFormers does not start: {error}") from error
        self._kernels: dict[int, Any] = {}

    def plan(self, step: Step) -> StepAttention:
        return _Step(self, step)

    def kernel(self, block_size: int) -> Any:
        """Its operator for a cache with blocks of this size."""
        if block_size not in self._kernels:
            read = int(np.gcd(block_size, WIDEST_READ))
            self._kernels[block_size] = type(
                f"FwOp{read}", (self._kernel,), {"BLOCK_N": read, "NAME": f"slipstream{read}"}
            )
        return self._kernels[block_size]


class _Step:
    def __init__(self, owner: Backend, step: Step) -> None:
        from slipstream.kernels.triton.attention import LONGEST_ROWS, attention  # there where this backend is chosen

        self._prompts, self._batch = attention, step.device
        self._owner, self._size = owner, step.shape.block_size
        host, device = step.host, step.device.block_tables.device
        counts = np.diff(host.q_start)
        segment = np.repeat(np.arange(host.num_segments), counts)
        is_row = (counts <= LONGEST_ROWS)[segment]
        self._has_prompts = not is_row.all()
        self._max_context = int(host.kv_len.max(initial=1))
        self._tokens: Tensor | None = None
        """Those that are rows; None for all."""
        self._mask: Any = None
        if is_row.any():
            if self._has_prompts:
                self._tokens = torch.from_numpy(np.flatnonzero(is_row)).to(device)
            seen = (host.positions[is_row] + 1).tolist()
            width = -(-max(seen) // self._size)
            tables = np.ascontiguousarray(host.block_tables[host.table_row[segment[is_row]], :width])
            masks = owner.library.attn_bias
            mask = masks.BlockDiagonalPaddedKeysMask.from_seqlens([1] * len(seen), width * self._size, seen)
            paged = mask.make_paged(torch.from_numpy(tables), self._size, masks.PagedBlockDiagonalPaddedKeysMask)
            self._mask = paged.to(device)

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        assert not window and not softcap and sinks is None
        if self._mask is None or self._has_prompts:
            k, v = keys.flatten(0, 1), values.flatten(0, 1)
            out = self._prompts(q, k, v, self._batch, scale, max_context=self._max_context, prompt=True, row_tokens=0)
            if self._mask is None:
                return out
            assert self._tokens is not None
            out[self._tokens] = self._rows(q[self._tokens], keys, values, scale)
            return out
        return self._rows(q, keys, values, scale)

    def _rows(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        tokens, heads, head_dim = q.shape
        kv_heads = keys.shape[2]
        group = heads // kv_heads
        grouped = q.reshape(1, tokens, kv_heads, group, head_dim)
        k, v = (x.reshape(1, -1, kv_heads, 1, head_dim).expand(-1, -1, -1, group, -1) for x in (keys, values))
        out: Tensor = self._owner.library.memory_efficient_attention_forward(
            grouped, k, v, attn_bias=self._mask, scale=scale, op=self._owner.kernel(self._size)
        )
        return out.view(tokens, heads, head_dim)
