"""The canary's decision: the rank test against scipy, error rates by simulation, bounds by hypothesis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from slipstream.server.evolution.canary import Canary, chance_if_equal
from slipstream.server.evolution.wish import Trial

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0, 1.5]), min_size=4, max_size=40)


@given(SCORES, SCORES)
def test_the_rank_test_is_scipys(low: list[float], high: list[float]) -> None:
    expected = mannwhitneyu(low, high, alternative="less", method="asymptotic").pvalue
    found = chance_if_equal(low, high)
    assert found == pytest.approx(1.0 if math.isnan(expected) else expected, abs=1e-9)


def run(rng: Any, baseline: float, canary: float, **options: Any) -> tuple[str, int]:
    """Requests with these chances per draft token, until the decision; how many of them ran on the canary."""
    trial = Canary(1, 2, **options)
    share = Trial(2, 1, is_live=False, share=0.3)
    for _ in range(100_000):
        version = 2 if share.takes(f"{rng.integers(1 << 60)}") else 1
        chance = canary if version == 2 else baseline
        # Requests differ: in length, and in how predictable they are.
        steps = 1 + int(rng.geometric(1 / 40))
        chance = np.clip(rng.normal(chance, 0.12), 0, 0.98)
        if trial.observe(version, steps, int(rng.binomial(steps, chance))) != "continue":
            return trial.decision, trial.counts[1]
    raise AssertionError("no decision")


@pytest.mark.parametrize("canary", [0.0, 0.2])
def test_a_much_worse_canary_is_rolled_back_soon(canary: float) -> None:
    rng = np.random.default_rng(0)
    results = [run(rng, 0.6, canary) for _ in range(100)]
    assert all(decision == "roll_back" and count <= 50 for decision, count in results)


def test_an_equal_canary_is_promoted_but_for_alpha() -> None:
    rng = np.random.default_rng(1)
    results = [run(rng, 0.5, 0.5, alpha=0.1) for _ in range(400)]
    wrong = sum(decision == "roll_back" for decision, _ in results)
    assert wrong <= 400 * 0.1 + 3 * math.sqrt(400 * 0.1 * 0.9)
    assert max(count for _, count in results) <= 200


def test_a_worse_canary_is_not_promoted_early_but_for_alpha() -> None:
    """Its scores are those of the baseline less the margin: what is shown early must not be the contrary."""
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(300):
        trial = Canary(1, 2, alpha=0.1, max_requests=160, margin=0.1)
        while trial.decision == "continue" and trial.counts[1] < 159:
            trial.observe(1, 1000, int(1000 * rng.gamma(4, 0.25)))
            trial.observe(2, 1000, int(900 * rng.gamma(4, 0.25)))
        wrong += trial.decision == "promote"
    assert wrong <= 300 * 0.1 + 3 * math.sqrt(300 * 0.1 * 0.9)


def test_a_better_canary_is_promoted_soon() -> None:
    rng = np.random.default_rng(3)
    results = [run(rng, 0.3, 0.7) for _ in range(100)]
    assert all(decision == "promote" and count <= 50 for decision, count in results)


OUTCOMES = st.lists(
    st.tuples(st.sampled_from([1, 2, 2, 3]), st.integers(0, 20), st.integers(0, 60)), min_size=1, max_size=400
)


@given(OUTCOMES, st.integers(4, 20), st.integers(0, 60))
def test_it_decides_once_and_in_time(outcomes: list[tuple[int, int, int]], least: int, more: int) -> None:
    trial = Canary(1, 2, min_requests=least, max_requests=least + more)
    decided = None
    for version, proposals, right in outcomes:
        decision = trial.observe(version, proposals, min(right, proposals))
        assert decision == trial.decision
        assert decided is None or decision == decided
        if decision != "continue":
            decided = decision
            assert trial.reason and trial.counts[1] >= least
        else:
            assert trial.counts[1] < least + more or trial.counts[0] < least


def test_requests_without_proposals_tell_nothing() -> None:
    trial = Canary(1, 2, max_requests=20)
    for _ in range(200):
        assert trial.observe(1, 0, 0) == trial.observe(2, 0, 0) == "continue"
    assert trial.counts == (0, 0)


@given(st.floats(0.05, 0.95), st.integers(1, 1000))
def test_the_share_of_requests_is_kept_and_repeatable(share: float, version: int) -> None:
    trial = Trial(version + 1, 1, is_live=False, share=share)
    taken = [trial.takes(request) for request in range(2000)]
    assert taken == [Trial(version + 1, 9, is_live=False, share=share).takes(request) for request in range(2000)]
    assert abs(sum(taken) / 2000 - share) < 5 * math.sqrt(share * (1 - share) / 2000)


@pytest.mark.parametrize("wrong", [{"alpha": 0.5}, {"min_requests": 3}, {"margin": 1.0}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a canary needs"):
        Canary(1, 2, **wrong)
