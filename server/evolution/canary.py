"""A new drafter on a share of the requests: is it as good as the one it is to replace?

A request's score is the share of its proposals whose first draft token was right, verified or not: it does not depend
on the load, under which more or fewer draft tokens are verified. Scores of both versions, of the same time, are
compared by the rank test of Mann and Whitney (1947), which asks nothing of their distribution. It looks when so many
requests have ended on the canary, and again when they are twice as many, and so on: a group sequential test whose looks
share ``alpha`` equally (Bonferroni), so that looking often does not raise the chance of a wrong answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from statistics import NormalDist
from typing import Literal

Decision = Literal["continue", "promote", "roll_back"]
BASELINE_KEPT = 1000
"""Scores of the baseline, the latest."""


class Canary:
    """Decides once: ``decision`` leaves "continue" after at most ``max_requests`` requests on the canary."""

    def __init__(
        self,
        baseline_version: int,
        canary_version: int,
        min_requests: int = 10,
        alpha: float = 0.05,
        max_requests: int = 200,
        margin: float = 0.1,
    ) -> None:
        """Rolls back if the canary is worse, promotes if it is not worse by ``margin`` of the baseline's scores.

        Args:
            alpha: the chance that a canary as good as the baseline is rolled back, at most; and that one which is worse
                by the margin is promoted before ``max_requests``.
            max_requests: on the canary; if neither was shown by then, it is promoted.
        """
        if not (0 < alpha < 0.5 and 0 <= margin < 1 and 4 <= min_requests <= max_requests):
            raise ValueError("a canary needs 0 < alpha < 0.5, 0 <= margin < 1 and 4 <= min <= max")
        self.baseline_version, self.canary_version = baseline_version, canary_version
        self.decision: Decision = "continue"
        self.reason = ""
        """Why it was decided so."""
        self._min, self._max, self._margin = min_requests, max_requests, margin
        self._alpha = alpha / (1 + math.ceil(math.log2(max_requests / min_requests)))
        self._next_look = min_requests
        self._baseline: deque[float] = deque(maxlen=BASELINE_KEPT)
        self._canary: list[float] = []

    def observe(self, version: int, proposals: int, right: int) -> Decision:
        """A request that ran on a version has ended; of so many proposals the first draft token was so often right.

        Requests of other versions, and those for which nothing was proposed, tell nothing.
        """
        if self.decision != "continue" or not proposals:
            return self.decision
        if version == self.baseline_version:
            self._baseline.append(right / proposals)
        elif version == self.canary_version:
            self._canary.append(right / proposals)
        if len(self._canary) >= self._next_look and len(self._baseline) >= self._min:
            self._look()
        return self.decision

    @property
    def means(self) -> tuple[float, float]:
        """Share of right first draft tokens, mean over requests: baseline, canary; 0 where nothing is known."""
        return _mean(self._baseline), _mean(self._canary)

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that ended: baseline (the latest 1000 at most), canary."""
        return len(self._baseline), len(self._canary)

    def _look(self) -> None:
        baseline, canary = list(self._baseline), self._canary
        good_enough = [score * (1 - self._margin) for score in baseline]
        if (p := chance_if_equal(canary, baseline)) < self._alpha:
            self._decide("roll_back", f"worse, p = {p:.2g}")
        elif (p := chance_if_equal(good_enough, canary)) < self._alpha:
            self._decide("promote", f"not worse by {self._margin:.0%}, p = {p:.2g}")
        elif len(canary) >= self._max:
            self._decide("promote", "not shown to be worse")
        self._next_look = min(2 * len(canary), self._max)

    def _decide(self, decision: Decision, why: str) -> None:
        before, now = self.means
        self.decision = decision
        self.reason = (
            f"{why}: {now:.1%} of first draft tokens right in {len(self._canary)} requests, before {before:.1%}"
        )


def chance_if_equal(low: Sequence[float], high: Sequence[float]) -> float:
    """Probability that ``low`` lies as far below ``high`` by chance alone: one-sided Mann-Whitney test.

    By the normal approximation with corrections for ties and continuity, which is close from about ten values on.
    """
    n, m = len(low), len(high)
    ranked = sorted([(value, True) for value in low] + [(value, False) for value in high])
    rank_sum = ties = 0.0
    rank = 1
    for _, group in groupby(ranked, key=lambda entry: entry[0]):
        members = [is_low for _, is_low in group]
        count = len(members)
        rank_sum += sum(members) * (rank + (count - 1) / 2)
        ties += count**3 - count
        rank += count
    u = rank_sum - n * (n + 1) / 2  # pairs in which low is above high
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    return NormalDist().cdf((u - n * m / 2 + 0.5) / math.sqrt(variance)) if variance > 0 else 1.0


def _mean(scores: Sequence[float] | deque[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0
