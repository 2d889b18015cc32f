"""The throughput policy on a machine without noise, against fixed numbers of draft tokens: what its learning costs.

    python scripts/simulate_controller.py [--known]

Acceptance and step costs are learned as on a server, from draft tokens that are right with a given probability and from
steps whose time is known but for 8 %; what a setting is worth is computed from the true times. With --known the
policy is told the true probabilities. Prints what it reaches of the best fixed number; takes half a minute.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from slipstream.engine.plan import StepWork
from slipstream.engine.runner.acceptance import Acceptance, OwnAcceptance, chances
from slipstream.engine.scheduling.controller import Offer, Throughput
from slipstream.engine.scheduling.step_cost import StepCost

MOST, CONTEXT, NOISE = 8, 300, 0.08
PROFILES = {
    "good": [0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 0.78, 0.76],
    "middling": [0.6, 0.55, 0.5, 0.45, 0.4, 0.4, 0.4, 0.4],
    "poor": [0.15] * MOST,
}
TOKENS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 288)
MILLISECONDS = (5.3, 6.2, 7.1, 7.9, 8.5, 8.6, 10.8, 13, 15.3, 22, 28.2, 42, 56, 84, 126)
"""Steps of so many positions, as measured once; with the kinks that the model of costs does not have."""


def seconds(tokens: int) -> float:
    return float(np.interp(tokens, TOKENS, MILLISECONDS)) / 1e3


def best_fixed(streams: int, right: list[float]) -> tuple[float, int]:
    """Tokens per second, and the number of draft tokens."""
    expected = np.concatenate(([1.0], np.cumprod(right))).cumsum()
    return max((streams * expected[n] / seconds(streams * (1 + n)), n) for n in (0, 1, 2, 3, 4, 6, 8))


def policy(streams: int, right: list[float], steps: int, known: bool) -> tuple[float, float]:
    """Tokens per second, and draft tokens per stream."""
    random = np.random.default_rng(1)
    cost = StepCost()
    cost.calibrate([(StepWork(n, 10 * n, 10 * n), seconds(n)) for n in TOKENS], [])
    throughput, acceptance = Throughput(), Acceptance(1, MOST)
    own = [OwnAcceptance() for _ in range(streams)]
    left = [max(512 // streams, 64)] * streams
    time = tokens = drafts = 0.0
    for _ in range(steps):
        rates = acceptance.rates([0] * MOST, range(MOST))
        parents = range(-1, MOST - 1)
        truth = np.cumprod(right).tolist()
        offers = [Offer(truth if known else chances(rates, parents, each.factor()), CONTEXT) for each in own]
        read = CONTEXT * streams
        decision = throughput.decide(offers, StepWork(streams, read, read), cost)
        size = streams + sum(decision.counts)
        time += seconds(size)
        drafts += sum(decision.counts)
        cost.observe(StepWork(size, read, read), seconds(size) * math.exp(NOISE * random.standard_normal()))
        for stream, count in enumerate(decision.counts):
            hits = random.random(MOST) < right
            in_a_row = int(hits.argmin()) if not hits.all() else MOST
            sampled = 1 + min(in_a_row, count)
            seen = [(0, at, bool(hits[at])) for at in range(min(sampled, in_a_row + 1, MOST))]
            for _, at, was_right in seen:
                own[stream].observe(rates[at], was_right)
            acceptance.observe(seen)
            tokens += sampled
            left[stream] -= sampled
            if left[stream] <= 0:
                left[stream], own[stream] = max(512 // streams, 64), OwnAcceptance()
    return tokens / time, drafts / steps / streams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--known", action="store_true", help="the true probabilities are known")
    options = parser.parse_args()
    print("| streams | drafter | best fixed | throughput policy | draft tokens per stream |\n|---|---|---|---|---|")
    for streams in (1, 4, 16, 32):
        for name, right in PROFILES.items():
            best, count = best_fixed(streams, right)
            rate, drafts = policy(streams, right, 3000 // max(streams // 2, 1), options.known)
            print(f"| {streams} | {name} | {count} | {rate / best:.3f} | {drafts:.2f} |", flush=True)


if __name__ == "__main__":
    main()
