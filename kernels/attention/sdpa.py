"""Torch's own attention over the paged cache: segment after segment, keys and values gathered from their blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from slipstream.kernels import reference
from slipstream.kernels.attention.backend import Step, StepAttention


class Backend:
    name: ClassVar[str] = "torch"

    def plan(self, step: Step) -> StepAttention:
        return _Segments(step)


class _Segments:
    def __init__(self, step: Step) -> None:
        host, device = step.host, step.device.block_tables.device
        size = host.block_size
        self._segments: list[tuple[slice, Tensor, int]] = []
        """Tokens, blocks of the sequence, and its length."""
        for segment in range(host.num_segments):
            begin, end = int(host.q_start[segment]), int(host.q_start[segment + 1])
            length = int(host.kv_len[segment])
            blocks = torch.from_numpy(host.block_tables[host.table_row[segment], : -(-length // size)])
            self._segments.append((slice(begin, end), blocks.to(device, torch.long), length))
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for tokens, blocks, length in self._segments:
            k, v = keys[blocks].flatten(0, 1)[:length], values[blocks].flatten(0, 1)[:length]
            if softcap or sinks is not None:  # torch's has neither
                out[tokens] = reference.attention(q[tokens], k, v, scale, window, softcap, sinks)
                continue
            count = tokens.stop - tokens.start
            if window:  # nobody sees what is before the first token's window
                first = max(length - count - window + 1, 0)
                k, v = k[first:], v[first:]
            states = [x.to(q.dtype).transpose(0, 1)[None] for x in (q[tokens], k, v)]
            mask = None if count == 1 else self._mask(count, len(k), window, q.device)
            attended = scaled_dot_product_attention(
                states[0], states[1], states[2], attn_mask=mask, scale=scale, enable_gqa=True
            )
            out[tokens] = attended[0].transpose(0, 1)
        return out

    def _mask(self, count: int, length: int, window: int, device: torch.device) -> Tensor:
        """Which of the keys each of the last tokens sees [count, length]."""
        key = count, length, window
        if key not in self._masks:
            seen = torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
            self._masks[key] = seen.triu(length - count - window + 1) if window else seen
        return self._masks[key]
