"""How likely guesses are to be right, learned from what became of earlier ones."""

from __future__ import annotations

import numpy as np

DECAY = 0.98
"""Weight of an observation after each later one with the same evidence: some 50 count."""
POOL_WEIGHT = 4.0
"""Observations at a position that count as much as all positions together."""
PRIOR_WEIGHT = 4.0
"""Observations that the first estimate is worth."""
OWN_DECAY = 0.96
OWN_WEIGHT = 8.0
"""Guesses of its own after which a request's estimate is half its own and half everybody's."""
MOST_LIKELY = 0.995


class Acceptance:
    """Of one drafter: the probability that guess i is right if those before it were, by evidence and position.

    Far positions are seen seldom, only after the near ones were right. So what is known of them fades with every
    observation, whatever its position, and gives way to what is known of all positions together.
    """

    def __init__(self, num_evidence: int, positions: int) -> None:
        self._first = np.linspace(0.4, 0.8, num_evidence) if num_evidence > 1 else np.full(1, 0.6)
        self._tried = np.zeros((num_evidence, positions))
        self._right = np.zeros((num_evidence, positions))

    def rates(self, evidence: int, count: int) -> list[float]:
        """Of the first ``count`` guesses, each given that those before it are right."""
        tried, right = self._tried[evidence], self._right[evidence]
        pool = (right.sum() + PRIOR_WEIGHT * self._first[evidence]) / (tried.sum() + PRIOR_WEIGHT)
        rates: list[float] = ((right[:count] + POOL_WEIGHT * pool) / (tried[:count] + POOL_WEIGHT)).tolist()
        return rates

    def observe(self, evidence: int, tried: int, right: int) -> None:
        """``tried`` guesses were looked at and the first ``right`` of them were right."""
        self._tried[evidence] *= DECAY
        self._right[evidence] *= DECAY
        self._tried[evidence, : min(right + 1, tried)] += 1
        self._right[evidence, :right] += 1


class OwnAcceptance:
    """How much more or less often than expected guesses are right for one request."""

    __slots__ = ("_expected", "_right")

    def __init__(self) -> None:
        self._expected = self._right = 0.0

    def factor(self) -> float:
        return (self._right + OWN_WEIGHT) / (self._expected + OWN_WEIGHT)

    def observe(self, rates: list[float], right: int) -> None:
        """The guesses had these rates and the first ``right`` of them were right."""
        for position, rate in enumerate(rates[: right + 1]):
            self._expected = self._expected * OWN_DECAY + rate
            self._right = self._right * OWN_DECAY + (position < right)


def chances(rates: list[float], factor: float) -> list[float]:
    """Probability that each guess and all before it are right; falls from one to the next."""
    chance = 1.0
    result = []
    for rate in rates:
        chance *= min(rate * factor, MOST_LIKELY)
        result.append(chance)
    return result
