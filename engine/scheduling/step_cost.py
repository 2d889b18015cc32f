"""How long a step takes, learned from steps: the base of chunk sizes and of draft lengths.

seconds = curve(tokens) + a * reads + b * pairs. The curve is piecewise linear between knots: on every machine it is
flat while weights are what takes time, grows once arithmetic does, and falls nowhere. ``reads`` is what attention
moves, ``pairs`` what it computes: eight streams read eight caches, eight positions of one stream read one.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from slipstream.engine.plan import StepWork

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
READS = len(KNOTS)
PAIRS = READS + 1
CONTEXT_UNIT = 10_000.0
"""Scales the slopes to the size of the other parameters."""
NOISE = 0.1
"""Steps of equal size differ by about this share of their time."""
DOUBT = 0.05
"""How far, as a share of a typical step, a parameter may be off by itself before anything was observed."""
DRIFT = 0.002
"""How far, as a share of a typical step, a parameter wanders by itself from step to step."""
COMMON_DOUBT = 0.1
COMMON_DRIFT = 0.01
"""The same for all parameters together: machines get slower and faster as a whole, also for sizes not seen lately."""
LEAST = 0.01
"""No size gets cheaper than this share of what it was taken for at first: from zero no surprise could lift it again."""
MAX_SURPRISE = 0.5
"""A step that took much longer than predicted says more about the machine than about the model."""
TOGETHER = 8
"""Steps of one size that follow each other are learned from so many at a time: it takes a tenth of a millisecond, which
is two percent of a small step."""


class StepCost:
    """A Kalman filter over the knots and the slopes (Kalman 1960), which wander as the machine's load changes."""

    def __init__(self, first_estimate: float = 0.01) -> None:
        self._curve = np.array([first_estimate * (1 + knot / 64) for knot in KNOTS] + [0.0, 0.0])
        self._first: StepWork | None = None
        """The first of the steps of one size that are still to be learned from."""
        self._predicted = self._error = 0.0
        """Seconds of that step, and by how many they took longer, all together."""
        self._count = 0
        self._trust_nothing()

    def predict(self, work: StepWork) -> float:
        """Seconds of a step."""
        return float(max(self._features(work) @ self._curve, 0.0))

    def predict_more(self, work: StepWork, most: int, mean_start: float) -> NDArray[np.float64]:
        """Seconds of a step with 0, 1, … ``most`` positions more, which attend to ``mean_start`` others on average."""
        more = np.arange(most + 1)
        seconds: NDArray[np.float64] = np.interp(work.tokens + more, KNOTS, self._curve[:READS])
        pairs = work.pairs + more * mean_start
        seconds += (self._curve[READS] * work.reads + self._curve[PAIRS] * pairs) / CONTEXT_UNIT
        return seconds

    def calibrate(self, profile: list[tuple[StepWork, float]], probes: list[tuple[StepWork, float]]) -> None:
        """Sets the curve and the slopes from measured steps.

        Args:
            profile: steps of ascending size with little to attend to; beyond the last one the curve goes on as it does
                before it.
            probes: two steps of as many tokens as one of the profile, one with far more reads, one with far more pairs.
        """
        near = {work.tokens: (work, seconds) for work, seconds in profile}
        excess = [(work, seconds, *near[work.tokens]) for work, seconds in probes]
        matrix = [[w.reads - n.reads, w.pairs - n.pairs] for w, _, n, _ in excess]
        slopes = np.linalg.lstsq(
            np.array(matrix, float).reshape(-1, 2), np.array([s - t for _, s, _, t in excess]), rcond=None
        )[0]
        reads, pairs = np.maximum(slopes, 0.0)
        points = [(w.tokens, max(s - reads * w.reads - pairs * w.pairs, LEAST * s)) for w, s in profile]
        knots = np.array([_through(points, knot) for knot in KNOTS])
        # Something came between where fewer tokens took longer: times err upwards only.
        self._curve = np.array([*_never_falling(knots), reads * CONTEXT_UNIT, pairs * CONTEXT_UNIT])
        self._trust_nothing()

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns from one step, though maybe not before others of its size."""
        if self._first is not None and self._first.tokens != work.tokens:
            self._learn(self._first)
        if self._first is None:
            self._first, self._predicted, self._error, self._count = work, self.predict(work), 0.0, 0
        most = MAX_SURPRISE * self._predicted
        self._error += min(max(seconds - self._predicted, -most), most)
        self._count += 1
        if self._count == TOGETHER:
            self._learn(self._first)

    def _learn(self, work: StepWork) -> None:
        """Takes the mean of these steps for one measurement, which is as much surer."""
        self._first, count, error = None, self._count, self._error / self._count
        features, variance = self._features(work), self._variance
        variance.flat[:: len(variance) + 1] += count * self._drift
        variance += np.outer(self._curve, self._curve) * (count * COMMON_DRIFT**2)
        # What was not seen for long is doubted as much as at the start, and no more.
        cap = np.sqrt(np.minimum(self._most / variance.diagonal(), 1.0))
        variance *= np.outer(cap, cap)
        seen = variance @ features
        gain = seen / (features @ seen + (NOISE * self._predicted) ** 2 / count + 1e-18)
        self._curve = np.maximum(self._curve + gain * error, self._least)
        self._curve[:READS] = _never_falling(self._curve[:READS], slow=error > 0)
        variance -= np.outer(gain, seen)

    def table(self) -> dict[int, float]:
        """Seconds per knot with nothing to attend to."""
        return dict(zip(KNOTS, self._curve[:READS].tolist(), strict=True))

    def chunk_within(self, seconds: float, work: StepWork, begin: int, most: int) -> int:
        """The largest chunk of a prompt, from position ``begin`` and at most ``most`` tokens, that fits.

        ``work`` is what the step holds already. Returns 0 if nothing fits.
        """
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.predict(work.add(begin, middle)) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def _features(self, work: StepWork) -> NDArray[np.float64]:
        left = min(max(bisect_right(KNOTS, work.tokens) - 1, 0), len(KNOTS) - 2)
        # Beyond the last knot the share exceeds 1.
        share = max(work.tokens - KNOTS[left], 0) / (KNOTS[left + 1] - KNOTS[left])
        features = np.zeros(len(self._curve))
        features[left], features[left + 1] = 1 - share, share
        features[READS], features[PAIRS] = work.reads / CONTEXT_UNIT, work.pairs / CONTEXT_UNIT
        return features

    def _trust_nothing(self) -> None:
        is_knot = np.arange(len(self._curve)) < READS
        # What was measured as next to nothing, by noise, is still to be learned.
        small_step = self._curve[: KNOTS.index(8) + 1].max()
        scale = np.maximum(self._curve, 0.1 * small_step)
        self._first = None
        self._least = np.where(is_knot, LEAST * self._curve, 0.0)
        self._drift = (DRIFT * scale) ** 2
        self._variance = np.diag((DOUBT * scale) ** 2) + np.outer(self._curve, self._curve) * COMMON_DOUBT**2
        self._most = self._variance.diagonal().copy()


def _never_falling(knots: NDArray[np.float64], slow: bool = False) -> NDArray[np.float64]:
    """Fewer tokens never take longer: a slow step raises what more tokens take, any other lowers what fewer do."""
    return np.maximum.accumulate(knots) if slow else np.minimum.accumulate(knots[::-1])[::-1]


def _through(points: list[tuple[int, float]], knot: int) -> float:
    """Linear interpolation through (tokens, seconds); beyond the end in proportion to the last slope."""
    if knot <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if knot <= x1:
            return y0 + (y1 - y0) * (knot - x0) / (x1 - x0)
    (x0, y0), (x1, y1) = points[-2:]
    return y1 + max(y1 - y0, 0.0) * (knot - x1) / (x1 - x0)
