"""Numbers that become blocks of few bits, on a GPU: by the rules of csrc/quantise.h, but for the order of sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.kernels.triton.blocks import Read

LARGEST = 65504.0
"""The largest number of float16."""
FITS = tuple(13.8 + 0.25 * step for step in range(9))
"""Steps between the lowest and the highest number of a block that are tried, of which it has 15."""
SAME = 1 / 64
"""Off by less than this share of a step, numbers came from such a block, which is to be the same again."""


def of_four_bits(numbers: Tensor) -> Read:
    """Numbers [rows, k] float32 as blocks of 32 of the type Q4_1."""
    x = numbers.unflatten(-1, (-1, 32))
    low, high = x.aminmax(dim=-1, keepdim=True)
    total, width = x.sum(-1, keepdim=True), high - low
    best: _Line | None = None
    for steps in FITS:
        line = _nearest(x, total, steps * _inverse(width), low)
        best = line if best is None else best.or_nearer(line)
    assert best is not None
    best = best.or_nearer(_nearest(x, total, _inverse(best.scale), best.lowest))
    widest, nearer = _Placed.on(x, width / 15, low), _Placed.on(x, best.scale, best.lowest)
    is_taken = (widest.lost > 32 * (SAME * widest.scale).square()) & (nearer.lost < widest.lost)
    stored, scale, lowest = (
        torch.where(is_taken, ours, theirs)
        for ours, theirs in (
            (nearer.places, widest.places),
            (nearer.scale, widest.scale),
            (nearer.lowest, widest.lowest),
        )
    )
    return stored.to(torch.uint8), scale, lowest


@dataclass(frozen=True, slots=True)
class _Line:
    """One for each block, [rows, blocks, 1]."""

    scale: Tensor
    lowest: Tensor
    lost: Tensor
    """The sum of squares of what its numbers are off, less the sum of their squares."""

    def or_nearer(self, other: _Line) -> _Line:
        is_nearer = other.lost < self.lost
        pairs = (other.scale, self.scale), (other.lowest, self.lowest), (other.lost, self.lost)
        return _Line(*(torch.where(is_nearer, *pair) for pair in pairs))


def _nearest(x: Tensor, total: Tensor, inverse: Tensor, lowest: Tensor) -> _Line:
    """The line that is nearest to numbers in the places that they take on another one."""
    q = ((x - lowest) * inverse).round().clamp(0, 15)
    places, product = q.sum(-1, keepdim=True), (q * x).sum(-1, keepdim=True)
    spread = 32 * q.square().sum(-1, keepdim=True) - places.square()
    scale = (32 * product - places * total) * _inverse(spread)
    lowest = (total - scale * places) / 32
    return _Line(scale, lowest, -scale * product - lowest * total)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Blocks as they are kept, and how much is lost of each."""

    places: Tensor
    scale: Tensor
    lowest: Tensor
    lost: Tensor

    @classmethod
    def on(cls, x: Tensor, scale: Tensor, lowest: Tensor) -> _Placed:
        scale, lowest = _half(scale), _half(lowest)
        places = ((x - lowest) * _inverse(scale)).round().clamp(0, 15)
        return cls(places, scale, lowest, (scale * places + lowest - x).square().sum(-1, keepdim=True))


def _half(numbers: Tensor) -> Tensor:
    """The nearest numbers that a float16 has."""
    return numbers.clamp(-LARGEST, LARGEST).half().float()


def _inverse(numbers: Tensor) -> Tensor:
    return torch.where(numbers != 0, 1 / numbers, 0)
