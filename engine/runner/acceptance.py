"""How likely draft tokens are to be right, learned from what became of earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DECAY = 0.98
"""Weight of an observation after each later one with the same evidence: some 50 count."""
POOL_WEIGHT = 4.0
"""Observations at a position that count as much as all positions together."""
PRIOR_WEIGHT = 4.0
"""Observations that the first estimate is worth."""
OWN_DECAY = 0.96
OWN_WEIGHT = 8.0
"""Draft tokens after which a request's estimate is half its own and half everybody's."""
MOST_LIKELY = 0.995


class Acceptance:
    """How likely draft tokens of one drafter are to be right if those before them are, by evidence and position.

    The position of a draft token is the number of draft tokens before it on its path. Far positions are seen seldom,
    only after the near ones were right. So what is known of them fades with every observation, whatever its position,
    and gives way to what is known of all positions together.
    """

    def __init__(self, num_evidence: int, positions: int, before: Acceptance | None = None) -> None:
        """``before``: that of the version which this one replaces, whose rates are the first estimate."""
        if before is not None:
            self._first = [before._pool(level) for level in range(num_evidence)]
        elif num_evidence > 1:
            self._first = [0.4 + 0.4 * i / (num_evidence - 1) for i in range(num_evidence)]
        else:
            self._first = [0.6]
        self._tried = [[0.0] * positions for _ in range(num_evidence)]
        self._right = [[0.0] * positions for _ in range(num_evidence)]

    def rates(self, evidence: Sequence[int], positions: Sequence[int]) -> list[float]:
        """Acceptance of draft tokens by evidence and position, each given that those before it are right."""
        pools = {level: self._pool(level) for level in set(evidence)}
        return [
            (self._right[level][at] + POOL_WEIGHT * pools[level]) / (self._tried[level][at] + POOL_WEIGHT)
            for level, at in zip(evidence, positions, strict=True)
        ]

    def _pool(self, level: int) -> float:
        """Acceptance of draft tokens with this evidence at any position."""
        return (sum(self._right[level]) + PRIOR_WEIGHT * self._first[level]) / (sum(self._tried[level]) + PRIOR_WEIGHT)

    def observe(self, seen: Iterable[tuple[int, int, bool]]) -> None:
        """Draft tokens of one proposal were looked at: the evidence of each, its position, and whether it was right."""
        seen = list(seen)
        for level in {evidence for evidence, _, _ in seen}:
            self._tried[level] = [count * DECAY for count in self._tried[level]]
            self._right[level] = [count * DECAY for count in self._right[level]]
        for evidence, position, right in seen:
            self._tried[evidence][position] += 1
            self._right[evidence][position] += right


class OwnAcceptance:
    """How much more or less often than expected draft tokens are right for one request."""

    __slots__ = ("_expected", "_right")

    def __init__(self) -> None:
        self._expected = self._right = 0.0

    def factor(self) -> float:
        return (self._right + OWN_WEIGHT) / (self._expected + OWN_WEIGHT)

    def observe(self, rate: float, right: bool) -> None:
        """Draft tokens followed a token that was right, one of them right with this probability."""
        self._expected = self._expected * OWN_DECAY + rate
        self._right = self._right * OWN_DECAY + right


def chances(rates: Sequence[float], parents: Sequence[int], factor: float) -> list[float]:
    """Probability that each draft token and all before it are right; less than that of its parent."""
    result: list[float] = []
    for rate, parent in zip(rates, parents, strict=True):
        result.append((result[parent] if parent >= 0 else 1.0) * min(rate * factor, MOST_LIKELY))
    return result
