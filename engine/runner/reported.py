"""Log-probabilities that requests want to be told: computed where logits are, and read in one piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.messages import TokenLogprobs
from slipstream.kernels import ops
from slipstream.kernels.readback import sent

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot carry."""
Asked = tuple[int, Sequence[int]]
"""How many of the most likely tokens, and which others besides."""
Read = Callable[[NDArray[np.int32]], list[TokenLogprobs | None]]


def report(logits: Tensor, tokens: Tensor, asked: Sequence[Asked]) -> tuple[Tensor, Read]:
    """Log-probabilities of a token per row of logits [rows, vocab], of the most likely ones and of others asked for.

    Returns [n] int32 on the device, and what makes them, on the host, an entry per row; None for a row that has none,
    because its logits are not finite.
    """
    most = max(count for count, _ in asked)
    logprobs, ranks, top_tokens, top_logprobs = ops.log_probabilities(logits, tokens, most)
    parts = [tokens.int(), ranks.int(), logprobs.view(torch.int32)]
    parts += [top_tokens.int().flatten(), top_logprobs.contiguous().view(torch.int32).flatten()]
    for row, (_, others) in enumerate(asked):
        if others:
            at = sent(np.array(others, np.int64), logits.device)
            parts.append(logits[row].float().log_softmax(-1)[at].view(torch.int32))
    rows = len(asked)

    def read(told: NDArray[np.int32]) -> list[TokenLogprobs | None]:
        ids, places, own, best, values, *_ = np.split(told, np.cumsum([rows, rows, rows, rows * most, rows * most]))
        rest = told[3 * rows + 2 * rows * most :]
        best, likely = best.reshape(rows, most), _numbers(values).reshape(rows, most)
        found: list[TokenLogprobs | None] = []
        for row, (count, others) in enumerate(asked):
            of_others, rest = _numbers(rest[: len(others)]).tolist(), rest[len(others) :]
            value = _numbers(own[row : row + 1])[0]
            top = [
                (token, max(logprob, LOWEST_LOGPROB))
                for token, logprob in zip(best[row, :count].tolist(), likely[row, :count].tolist(), strict=True)
                if token >= 0
            ]
            entry = TokenLogprobs(
                *(int(ids[row]), max(float(value), LOWEST_LOGPROB), int(places[row])),
                top,
                [max(logprob, LOWEST_LOGPROB) for logprob in of_others],
            )
            found.append(None if np.isnan(value) else entry)
        return found

    return torch.cat(parts), read


def _numbers(bits: NDArray[np.int32]) -> NDArray[np.float32]:
    return bits.view(np.float32)
