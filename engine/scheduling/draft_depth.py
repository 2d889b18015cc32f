"""How many draft tokens a network is asked for: as many as are worth the time of proposing and of verifying them.

Lookups propose at once, so they are asked for as many as may be verified. A network takes as long for each as a small
step: on a processor that computes slowly, chains of eight take a third of a step, of which the last ones are hardly
ever right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.step_cost import StepCost

WEIGHT = 0.05
"""Weight of a step in what is known of draft tokens."""
FORGETTING = 0.01
"""The same, where nobody asked for them in the step."""
LEAST_S = 1e-9
"""No chain, and no step, is taken to be quicker: times are divided by."""
TIME_WEIGHT = 0.1
"""Weight of a step in the mean time; one that takes more than twice as long as expected counts as twice."""


class DraftDepth:
    """Learns from every step what networks offer, and how long proposing takes with so many rows."""

    def __init__(self, most: int) -> None:
        """``most`` draft tokens per row may be asked for."""
        self._most = most
        self._rates: list[float] = []
        """Mean probability that draft token i of a row is right if those before it are; as deep as was seen."""
        self._seconds: dict[int, dict[int, float]] = {}
        """Time of proposing chains of so many draft tokens for all rows, by the binary order of their number. The first
        token takes longer than the others: with it networks look at what the step computed."""

    def observe(self, asked: int, offers: Sequence[Sequence[float]], seconds: float) -> None:
        """Networks were asked for ``asked`` draft tokens, and took so long.

        ``offers`` are what was kept for each row. Longer ones than were asked for are of lookups; shorter ones ended
        where hardly anything was right any more.
        """
        own = [offer for offer in offers if 0 < len(offer) <= asked]
        if not own:
            return
        deepest, above = max(map(len, own)), float(len(own))
        for place in range(deepest):
            if not above:
                break
            total = sum(offer[place] for offer in own if place < len(offer))
            rate, above = total / above, total
            if place < len(self._rates):
                self._rates[place] += WEIGHT * (rate - self._rates[place])
            else:
                self._rates.append(rate)
        # Deeper ones may have become as good as the deepest that was seen: so they are tried again some time.
        for place in range(deepest, len(self._rates)):
            self._rates[place] += FORGETTING * (self._rates[deepest - 1] - self._rates[place])
        known = self._seconds.setdefault(len(offers).bit_length(), {})
        before = known.setdefault(deepest, seconds)
        share = 1 + TIME_WEIGHT * (min(seconds / max(before, LEAST_S), 2.0) - 1)
        for depth in known:  # a machine that is slower now is so for all of them
            known[depth] *= share

    def best(self, rows: int, work: StepWork, start: float, cost: StepCost) -> int:
        """Draft tokens per row that promise most tokens per second, at least one; all where nothing is known.

        ``work`` is a step of these rows without draft tokens, and ``start`` the mean position of the first of them.
        """
        if not self._rates or not rows:
            return self._most
        known = self._known(rows)
        if len(known) == 1 and self._most > 1:
            return next(iter(known)) // 2 or 2  # what one token more takes shows with another depth
        depths = np.arange(1, self._most + 1)
        verify = cost.predict_more(work, rows * self._most, start)[rows * depths]
        # Beyond what was seen, draft tokens are taken to be as often right as the last ones that were.
        rates = np.array(self._rates + self._rates[-1:] * self._most)[: self._most]
        tokens = 1 + np.cumsum(np.cumprod(rates))
        return int(depths[np.argmax(tokens / (verify + _through(known, depths)))])

    def seconds(self, rows: int, depth: int) -> float | None:
        """How long proposing chains of this depth for all rows takes; None where nobody has seen as many rows."""
        known = self._seconds.get(rows.bit_length())
        return None if known is None else float(_through(known, np.array([depth]))[0])

    def table(self) -> dict[int, list[float]]:
        """By a number of rows of which it is known: the seconds of proposing 1, 2, … draft tokens for all of them."""
        depths = np.arange(1, self._most + 1)
        return {2 ** (order - 1): _through(known, depths).tolist() for order, known in self._seconds.items()}

    def _known(self, rows: int) -> dict[int, float]:
        """Seconds by depth; of the number of rows nearest to this one of which it is known."""
        bucket = rows.bit_length()
        return self._seconds[min(self._seconds, key=lambda known: abs(known - bucket))]


def _through(known: Mapping[int, float], depths: NDArray[np.int_]) -> NDArray[np.float64]:
    """Seconds for each depth: straight lines through those that are known, and on as they begin and end."""
    at = np.array(sorted(known))
    seconds: NDArray[np.float64] = np.maximum.accumulate([known[depth] for depth in at])
    found: NDArray[np.float64]
    if len(at) == 1:
        found = seconds[0] * depths / at[0]
        return found
    slopes = np.diff(seconds) / np.diff(at)
    found = np.interp(depths, at, seconds)
    found += slopes[-1] * np.maximum(depths - at[-1], 0)
    found -= slopes[0] * np.maximum(at[0] - depths, 0)
    return found.clip(seconds[0] * np.minimum(depths / at[0], 1.0))  # one token takes something
