"""How long a step takes, learned from steps: the base of chunk sizes and later of draft lengths.

seconds(tokens, context) = curve(tokens) + slope * context, where ``tokens`` is the number of tokens in the step and
``context`` the sum over them of the positions each attends to. The curve is piecewise linear between knots: on every
machine it is flat while weights are what takes time and grows once arithmetic does.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import numpy as np

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SLOPE = len(KNOTS)
CONTEXT_UNIT = 10_000.0
"""Scales the slope to the size of the other parameters."""
NOISE = 0.1
"""Steps of equal size differ by about this share of their time."""
DOUBT = 0.5
"""How far, as a share of a typical step, a parameter may be off before anything was observed."""
DRIFT = 0.01
"""How far, as a share of a typical step, a parameter wanders from step to step."""
MAX_SURPRISE = 0.5
"""A step that took much longer than predicted says more about the machine than about the model."""


class StepCost:
    """A Kalman filter over the knots and the slope (Kalman 1960), which wander slowly as the machine's load changes."""

    def __init__(self, first_guess: float = 0.01) -> None:
        self._curve = np.array([first_guess * (1 + knot / 64) for knot in KNOTS] + [0.0])
        self._trust_nothing()

    def predict(self, tokens: int, context: int) -> float:
        """Seconds of a step."""
        left, share = _position(tokens)
        curve = self._curve
        seconds = curve[left] * (1 - share) + curve[left + 1] * share + curve[SLOPE] * (context / CONTEXT_UNIT)
        return float(max(seconds, 0.0))

    def calibrate(self, profile: list[tuple[int, int, float]], probe: tuple[int, int, float]) -> None:
        """Sets the curve and the slope from measured steps.

        Args:
            profile: (tokens, context, seconds), ascending in tokens; beyond the last one the curve goes on as it does
                before it.
            probe: a step of as many tokens as one of the profile, but with far more context.
        """
        tokens, context, seconds = probe
        near_context, near_seconds = next((c, s) for n, c, s in profile if n == tokens)
        slope = max(seconds - near_seconds, 0.0) / ((context - near_context) / CONTEXT_UNIT)
        points = [(n, max(s - slope * c / CONTEXT_UNIT, 0.0)) for n, c, s in profile]
        self._curve = np.array([*(_through(points, knot) for knot in KNOTS), slope])
        self._trust_nothing()

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """Learns from one step."""
        predicted = self.predict(tokens, context)
        error = min(max(seconds - predicted, -MAX_SURPRISE * predicted), MAX_SURPRISE * predicted)
        left, share = _position(tokens)
        features = np.zeros(len(self._curve))
        features[left], features[left + 1], features[SLOPE] = 1 - share, share, context / CONTEXT_UNIT
        variance = self._variance
        variance.flat[:: len(variance) + 1] = np.minimum(variance.diagonal() + self._drift, self._doubt)
        seen = variance @ features
        gain = seen / (features @ seen + (NOISE * predicted) ** 2 + 1e-18)
        self._curve = np.maximum(self._curve + gain * error, 0.0)
        variance -= np.outer(gain, seen)

    def table(self) -> dict[int, float]:
        """Seconds per knot at empty context."""
        return dict(zip(KNOTS, self._curve[:SLOPE].tolist(), strict=True))

    def _trust_nothing(self) -> None:
        scale = np.append(self._curve[:SLOPE], max(self._curve[SLOPE], 0.1 * self._curve[0]))
        self._doubt = (DOUBT * scale) ** 2
        self._drift = (DRIFT * scale) ** 2
        self._variance = np.diag(self._doubt)

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


def _through(points: list[tuple[int, float]], knot: int) -> float:
    """Linear interpolation through (tokens, seconds); beyond the end in proportion to the last slope."""
    if knot <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if knot <= x1:
            return y0 + (y1 - y0) * (knot - x0) / (x1 - x0)
    (x0, y0), (x1, y1) = points[-2:]
    return y1 + max(y1 - y0, 0.0) * (knot - x1) / (x1 - x0)
