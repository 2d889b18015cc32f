"""How long a step takes, learned from steps: the base of chunk sizes and later of draft lengths.

seconds(tokens, context) = curve(tokens) + slope * context, where ``tokens`` is the number of tokens in the step and
``context`` the sum over them of the positions each attends to. The curve is piecewise linear between knots: on every
machine it is flat while weights are what takes time and grows once arithmetic does.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LEARNING_RATE = 0.1
CONTEXT_UNIT = 10_000.0
"""Scales the context feature to the size of the others, which balances the update."""
MAX_SURPRISE = 0.5
"""A step that took much longer than predicted says more about the machine than about the model."""


class StepCost:
    """Least mean squares on the knots and the slope (Widrow & Hoff 1960, normalised)."""

    def __init__(self, first_guess: float = 0.01) -> None:
        self._curve = [first_guess * (1 + knot / 64) for knot in KNOTS]
        self._slope = 0.0

    def predict(self, tokens: int, context: int) -> float:
        """Seconds of a step."""
        left, share = _position(tokens)
        curve = self._curve[left] * (1 - share) + self._curve[left + 1] * share
        return curve + self._slope * (context / CONTEXT_UNIT)

    def calibrate(self, measured: list[tuple[int, int, float]]) -> None:
        """Sets the curve from (tokens, context, seconds) of a profile, ascending in tokens, and the slope.

        The entry of the largest context gives the slope, the others the curve; beyond them the curve goes on as the
        last two points do.
        """
        *points, (tokens, context, seconds) = sorted(measured, key=lambda entry: entry[1])
        points.sort()
        for index, knot in enumerate(KNOTS):
            self._curve[index] = _through(points, knot)
        self._slope = max(seconds - self.predict(tokens, 0), 0.0) / (context / CONTEXT_UNIT)

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """Learns from one step."""
        predicted = self.predict(tokens, context)
        error = min(max(seconds - predicted, -MAX_SURPRISE * predicted), MAX_SURPRISE * predicted)
        left, share = _position(tokens)
        scaled = context / CONTEXT_UNIT
        gain = LEARNING_RATE * error / ((1 - share) ** 2 + share**2 + scaled**2)
        self._curve[left] += gain * (1 - share)
        self._curve[left + 1] += gain * share
        self._slope = max(self._slope + gain * scaled, 0.0)

    def table(self) -> dict[int, float]:
        """Seconds per knot at empty context."""
        return dict(zip(KNOTS, self._curve, strict=True))

    def chunk_within(self, seconds: float, tokens: int, context: int, begin: int, most: int) -> int:
        """The largest chunk of a prompt, from position ``begin`` and at most ``most`` tokens, that fits.

        ``tokens`` and ``context`` are what the step holds already. Returns 0 if nothing fits.
        """
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.predict(tokens + middle, context + chunk_context(begin, middle)) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


def chunk_context(begin: int, count: int) -> int:
    """Positions attended to by ``count`` tokens from position ``begin`` on."""
    return count * begin + count * (count + 1) // 2


def _position(tokens: int) -> tuple[int, float]:
    """The knot left of ``tokens`` and how far it is to the next one; beyond the last knot the share exceeds 1."""
    left = min(max(bisect_right(KNOTS, tokens) - 1, 0), len(KNOTS) - 2)
    return left, max(tokens - KNOTS[left], 0) / (KNOTS[left + 1] - KNOTS[left])


def _through(points: list[tuple[int, int, float]], knot: int) -> float:
    """Linear interpolation through (tokens, _, seconds); beyond the end in proportion to the last slope."""
    if knot <= points[0][0] or len(points) == 1:
        return points[0][2]
    for (x0, _, y0), (x1, _, y1) in pairwise(points):
        if knot <= x1:
            return y0 + (y1 - y0) * (knot - x0) / (x1 - x0)
    (x0, _, y0), (x1, _, y1) = points[-2:]
    return y1 + max(y1 - y0, 0.0) * (knot - x1) / (x1 - x0)
