"""From logits to tokens, one row per position; every row is treated on its own, whatever else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = float("-inf")
FIRST_LOOK = 256
"""How many of the most likely tokens are sorted first; only rows whose nucleus is wider are sorted whole."""


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


def keep_top_k(logits: Tensor, top_k: Tensor) -> None:
    """Masks in place all but the top_k [rows] largest logits of each row; 0 keeps all. Ties at the border stay."""
    most = int(top_k.max())
    if most <= 0:
        return
    best = logits.topk(min(most, logits.shape[1]), dim=-1).values
    border = best.gather(1, (top_k.clamp(1, best.shape[1]) - 1)[:, None])
    border[top_k <= 0] = NEVER
    logits.masked_fill_(logits < border, NEVER)


def keep_min_p(probs: Tensor, min_p: Tensor) -> None:
    """Zeroes in place what is less likely than min_p [rows] times the most likely token of the row."""
    probs.masked_fill_(probs < probs.amax(-1, keepdim=True) * min_p[:, None], 0.0)


def keep_top_p(probs: Tensor, top_p: Tensor) -> None:
    """Zeroes in place what lies outside the smallest set of tokens with mass top_p [rows] (Holtzman et al. 2020).

    ``probs`` need not be normalised. Tokens as likely as the last one of the set stay with it.
    """
    wanted = probs.sum(-1) * top_p
    width = min(FIRST_LOOK, probs.shape[1])
    border, complete = _nucleus_border(probs, wanted, width)
    if width < probs.shape[1] and not bool(complete.all()):
        rest = (~complete).nonzero()[:, 0]
        border[rest], _ = _nucleus_border(probs[rest], wanted[rest], probs.shape[1])
    border[top_p >= 1.0] = 0.0
    probs.masked_fill_(probs < border[:, None], 0.0)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution at uniforms [rows] in [0, 1); weights need no norm."""
    cumulative = probs.double().cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)


def _nucleus_border(probs: Tensor, wanted: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Probability of the last token of each row's nucleus among its ``width`` best, and whether it lies there."""
    best = probs.topk(width, dim=-1).values
    mass = best.cumsum(-1)
    complete = mass[:, -1] >= wanted
    last = (mass < wanted[:, None]).sum(-1).clamp(max=width - 1)
    return best.gather(1, last[:, None])[:, 0], complete
