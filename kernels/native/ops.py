"""The operations that are compiled for the CPU; what they do not take, and the others, torch computes."""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from slipstream.kernels.native.library import load
from slipstream.kernels.reference import ReferenceOps


class NativeOps(ReferenceOps):
    name = "native"

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        return device.type == "cpu" and load() is not None

    def __init__(self) -> None:
        library = load()
        assert library is not None
        self._library: CDLL = library

    def argmax(self, logits: Tensor) -> Tensor:
        if not _fits(logits):
            return super().argmax(logits)
        out = torch.empty(len(logits), dtype=torch.int32)
        self._library.slip_argmax(logits.data_ptr(), len(logits), logits.shape[1], out.data_ptr(), None)
        return out.long()

    def argmax_with_probability(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if not _fits(logits):
            return super().argmax_with_probability(logits)
        out, likely = torch.empty(len(logits), dtype=torch.int32), torch.empty(len(logits))
        self._library.slip_argmax(logits.data_ptr(), len(logits), logits.shape[1], out.data_ptr(), likely.data_ptr())
        return out.long(), likely

    def distribution(self, logits: Tensor, temperature: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor) -> Tensor:
        if not _fits(logits):
            return super().distribution(logits, temperature, top_k, min_p, top_p)
        columns = [column.contiguous() for column in (temperature, top_k.int(), min_p, top_p)]
        pointers = [column.data_ptr() for column in columns]
        self._library.slip_distribution(logits.data_ptr(), len(logits), logits.shape[1], *pointers)
        return logits

    def draw(self, weights: Tensor, shares: Tensor) -> Tensor:
        if not _fits(weights):
            return super().draw(weights, shares)
        out = torch.empty(len(weights), dtype=torch.int32)
        shares = shares.double().contiguous()
        self._library.slip_draw(weights.data_ptr(), len(weights), weights.shape[1], shares.data_ptr(), out.data_ptr())
        return out.long()


def _fits(rows: Tensor) -> bool:
    return rows.dtype is torch.float32 and rows.is_contiguous()
