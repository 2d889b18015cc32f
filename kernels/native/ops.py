"""The operations that are compiled for the CPU; what they do not take, and the others, torch computes."""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from slipstream.kernels.native.library import address, load
from slipstream.kernels.reference import ReferenceOps

MOST_LIKELY = 100
"""Tokens of a row that are kept in order while it is read: of more, torch is quicker."""


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

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not _fits(logits) or count > MOST_LIKELY:
            return super().log_probabilities(logits, tokens, count)
        rows, n = logits.shape
        own, ranks = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        top_tokens, top = torch.empty(rows, count, dtype=torch.int32), torch.empty(rows, count)
        asked = tokens.int().contiguous()
        told = (column.data_ptr() for column in (own, ranks, top_tokens, top))
        self._library.slip_log_probabilities(logits.data_ptr(), rows, n, asked.data_ptr(), count, *told)
        return own, ranks, top_tokens, top

    def distribution(self, logits: Tensor, temperature: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor) -> Tensor:
        if not _fits(logits):
            return super().distribution(logits, temperature, top_k, min_p, top_p)
        columns = [column.contiguous() for column in (temperature, top_k.int(), min_p, top_p)]
        pointers = [column.data_ptr() for column in columns]
        self._library.slip_distribution(logits.data_ptr(), len(logits), logits.shape[1], *pointers)
        return logits

    def race(
        self, weights: Tensor, seeds: Tensor, indices: Tensor, count: int, ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not _fits(weights):
            return super().race(weights, seeds, indices, count, ids)
        rows, n = weights.shape
        places, scores = torch.empty(rows, count, dtype=torch.int32), torch.empty(rows, count)
        columns = [column.contiguous() for column in (seeds, indices)]
        tokens = None if ids is None else ids.int().contiguous()
        given = weights.data_ptr(), rows, n, *(column.data_ptr() for column in columns)
        self._library.slip_race(*given, address(tokens), count, places.data_ptr(), scores.data_ptr())
        return places.long(), scores


def _fits(rows: Tensor) -> bool:
    return rows.dtype is torch.float32 and rows.is_contiguous()
