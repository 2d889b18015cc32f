"""How many draft tokens to verify in a step: more of them may bring more tokens, and make the step longer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

import numpy as np

from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.step_cost import StepCost

PolicyName = Literal["throughput", "bandit", "fixed"]
LEAST_GAIN = 1.02
"""Verification has to promise this much more throughput: estimates are not exact, and drafting is not free."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What could be verified for one request."""

    chances: Sequence[float]
    """Probability that draft token i and all before it are right; falls from one to the next."""
    start: int
    """Position of the first of them."""


@dataclass(frozen=True, slots=True)
class Decision:
    counts: list[int]
    """Draft tokens to verify per offer."""
    reason: str
    plain_seconds: float = 0.0
    """Expected time of the step without draft tokens; 0 where none are verified, or the policy expects nothing."""
    arm: tuple[int, int] | None = None
    """Bucket and length that the reward is for, where the bandit decided."""


class Policy(Protocol):
    def decide(self, offers: Sequence[Offer], work: StepWork, cost: StepCost, plain_error: float = 1.0) -> Decision:
        """``work`` is the step without draft tokens, one token for each offer at least.

        ``plain_error``: how long such steps take, relative to what ``cost`` says.
        """

    def observe(self, decision: Decision, tokens: int, seconds: float) -> None:
        """The step brought so many tokens."""


class Throughput:
    """Verifies what maximises expected tokens per second.

    Draft tokens are taken in the order of their chances, over all requests; since the chances of a request fall along
    its list, a prefix of that order is a prefix of every list.
    """

    def decide(self, offers: Sequence[Offer], work: StepWork, cost: StepCost, plain_error: float = 1.0) -> Decision:
        chances = np.array([chance for offer in offers for chance in offer.chances])
        if not len(chances):
            return Decision([0] * len(offers), "nothing proposed")
        owners = np.repeat(np.arange(len(offers)), [len(offer.chances) for offer in offers])
        order = np.argsort(-chances, kind="stable")
        expected = len(offers) + np.concatenate(([0.0], np.cumsum(chances[order])))
        start = float(np.mean([offer.start for offer in offers]))
        seconds = cost.predict_more(work, len(chances), start)
        seconds[0] *= plain_error
        rate = expected / seconds
        best = int(rate.argmax())
        if rate[best] < LEAST_GAIN * rate[0]:
            return Decision([0] * len(offers), "not worth it")
        counts = np.bincount(owners[order[:best]], minlength=len(offers)).tolist()
        return Decision(counts, "worth it", float(seconds[0]))

    def observe(self, decision: Decision, tokens: int, seconds: float) -> None:
        """Everything it needs is in the chances and the cost."""


class Fixed:
    """Verifies a fixed number of draft tokens, or as many as there are."""

    def __init__(self, count: int) -> None:
        self._count = count

    def decide(self, offers: Sequence[Offer], work: StepWork, cost: StepCost, plain_error: float = 1.0) -> Decision:
        return Decision([min(self._count, len(offer.chances)) for offer in offers], "fixed")

    def observe(self, decision: Decision, tokens: int, seconds: float) -> None:
        """Nothing changes it."""


class Bandit:
    """Learns a length per batch size by trial: the bucketed epsilon-greedy rule of TLT (Hu et al. 2025).

    Batch sizes fall into buckets; each bucket keeps the mean reward of the last uses of each length, tokens per second.
    """

    LENGTHS = (0, 1, 2, 3, 4, 6, 8)
    EPSILON = 0.05
    MEMORY = 0.9
    FIRST = float("inf")

    def __init__(self, seed: int = 0) -> None:
        self._random = Random(seed)
        self._rewards: dict[int, dict[int, float]] = defaultdict(lambda: dict.fromkeys(self.LENGTHS, self.FIRST))

    def decide(self, offers: Sequence[Offer], work: StepWork, cost: StepCost, plain_error: float = 1.0) -> Decision:
        rewards = self._rewards[len(offers).bit_length()]
        explores = self._random.random() < self.EPSILON
        # A length that nobody has draft tokens for would never be tried, and look promising for ever.
        longest = max((len(offer.chances) for offer in offers), default=0)
        lengths = [length for length in self.LENGTHS if length <= longest]
        length = self._random.choice(lengths) if explores else max(lengths, key=rewards.__getitem__)
        counts = [min(length, len(offer.chances)) for offer in offers]
        arm = len(offers).bit_length(), length
        return Decision(counts, "explores" if explores else "best so far", arm=arm)

    def observe(self, decision: Decision, tokens: int, seconds: float) -> None:
        if decision.arm is None:
            return
        bucket, length = decision.arm
        before, reward = self._rewards[bucket][length], tokens / seconds
        self._rewards[bucket][length] = (
            reward if before == self.FIRST else (self.MEMORY * before + (1 - self.MEMORY) * reward)
        )


def make_policy(name: PolicyName, most: int) -> Policy:
    """``most`` is the length of the fixed policy."""
    match name:
        case "throughput":
            return Throughput()
        case "bandit":
            return Bandit()
        case "fixed":
            return Fixed(most)
