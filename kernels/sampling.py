"""From logits to tokens, one row per position; every row is treated on its own, whatever else is in the batch.

Each operation has a torch reference and, on the CPU, a compiled twin.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from slipstream.kernels.native.library import load

NEVER = float("-inf")
COLDEST = torch.finfo(torch.float32).tiny
"""Lower temperatures count as this one, which leaves the largest logit and its equals: their inverse is not a float."""


def argmax(logits: Tensor) -> Tensor:
    """Index of the first largest logit of each row [rows]; -1 where it is not finite or the row holds a NaN."""
    library = _native(logits)
    if library is None:
        return argmax_reference(logits)
    out = torch.empty(len(logits), dtype=torch.int32)
    library.slip_argmax(logits.data_ptr(), len(logits), logits.shape[1], out.data_ptr(), None)
    return out.long()


def argmax_reference(logits: Tensor) -> Tensor:
    best = logits.max(dim=-1)
    return best.indices.masked_fill(~best.values.isfinite(), -1)


def argmax_with_probability(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As argmax, and the probability of each at temperature 1 [rows]; 0 where there is none."""
    library = _native(logits)
    if library is None:
        return argmax_with_probability_reference(logits)
    out, likely = torch.empty(len(logits), dtype=torch.int32), torch.empty(len(logits))
    library.slip_argmax(logits.data_ptr(), len(logits), logits.shape[1], out.data_ptr(), likely.data_ptr())
    return out.long(), likely


def argmax_with_probability_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    best = argmax_reference(logits)
    likely = logits.softmax(-1).gather(-1, best.clamp(min=0)[:, None])[:, 0]
    return best, likely.masked_fill(best < 0, 0.0)


def distribution(logits: Tensor, temperature: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor) -> Tensor:
    """Weights proportional to the probability of drawing each token; may overwrite logits [rows, vocab] float32.

    In this order: divide by temperature (from 0 to COLDEST all the same), keep the top_k largest (0: all), drop what is
    less likely than min_p times the most likely, keep the smallest set with mass top_p of what is left (Holtzman et al.
    2020; 1: all). Tokens as likely as the last one kept stay with it. The parameters are [rows]: top_k int32, the rest
    float32.
    """
    temperature = temperature.clamp(min=COLDEST)
    library = _native(logits)
    if library is None:
        return distribution_reference(logits, temperature, top_k, min_p, top_p)
    columns = [column.contiguous() for column in (temperature, top_k.int(), min_p, top_p)]
    pointers = [column.data_ptr() for column in columns]
    library.slip_distribution(logits.data_ptr(), len(logits), logits.shape[1], *pointers)
    return logits


def distribution_reference(logits: Tensor, temperature: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor) -> Tensor:
    ranked = logits.sort(dim=-1, descending=True).values
    border = ranked.gather(1, (top_k.long().clamp(1, logits.shape[1]) - 1)[:, None])
    border[top_k <= 0] = NEVER
    kept = logits.masked_fill(logits < border, NEVER)
    weights = ((kept - ranked[:, :1]) / temperature[:, None]).exp()
    weights = weights.masked_fill(weights < min_p[:, None], 0.0)
    ordered = weights.sort(dim=-1, descending=True).values
    mass = ordered.cumsum(-1)
    last = (mass < mass[:, -1:] * top_p[:, None]).sum(-1).clamp(max=logits.shape[1] - 1)
    nucleus = ordered.gather(1, last[:, None])
    nucleus[top_p >= 1.0] = 0.0
    return weights.masked_fill(weights < nucleus, 0.0)


def draw(weights: Tensor, shares: Tensor) -> Tensor:
    """One token per row of weights [rows, vocab]: where the running sum exceeds the shares [rows], in [0, 1), of it."""
    library = _native(weights)
    if library is None:
        return draw_reference(weights, shares)
    out = torch.empty(len(weights), dtype=torch.int32)
    shares = shares.double().contiguous()
    library.slip_draw(weights.data_ptr(), len(weights), weights.shape[1], shares.data_ptr(), out.data_ptr())
    return out.long()


def draw_reference(weights: Tensor, shares: Tensor) -> Tensor:
    cumulative = weights.double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, shares[:, None].double() * cumulative[:, -1:], right=True)[:, 0]
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn, last)


def penalize(
    logits: Tensor,
    row: int,
    seen: Tensor,
    repetition: float,
    drawn: Tensor,
    counts: Tensor,
    frequency: float,
    presence: float,
) -> None:
    """Applies penalties to one row of logits [rows, vocab] in place.

    Args:
        seen: distinct tokens of prompt and output, which repetition divides (if positive) or multiplies (if negative)
            (Keskar et al. 2019).
        drawn, counts: distinct tokens of the output and how often each occurs: frequency * count + presence is
            subtracted.
    """
    if repetition != 1.0:
        values = logits[row, seen]
        logits[row, seen] = torch.where(values > 0, values / repetition, values * repetition)
    if frequency or presence:
        logits[row, drawn] -= frequency * counts + presence


def _native(rows: Tensor) -> CDLL | None:
    return load() if rows.device.type == "cpu" and rows.is_contiguous() and rows.dtype is torch.float32 else None
