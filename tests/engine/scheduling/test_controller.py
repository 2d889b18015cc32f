"""The policies as pure functions, against tables worked out by hand and against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.plan import StepWork
from slipstream.engine.runner.acceptance import Acceptance, OwnAcceptance, chances
from slipstream.engine.scheduling.controller import LEAST_GAIN, Bandit, Decision, Fixed, Offer, Throughput
from slipstream.engine.scheduling.step_cost import StepCost


def machine(flat: float = 0.010, per_token: float = 0.0) -> StepCost:
    """Steps take ``flat`` seconds, and so much more for each token."""
    cost = StepCost()
    cost.calibrate([(StepWork(n), flat + per_token * n) for n in (1, 2, 4, 8, 16, 32, 64, 128)], [])
    return cost


def decide(offers: list[list[float]], cost: StepCost) -> Decision:
    return Throughput().decide([Offer(offer, 0) for offer in offers], StepWork(len(offers)), cost)


@pytest.mark.parametrize(
    ("offers", "per_token", "counts", "reason"),
    [
        ([[]], 0.001, [0], "nothing proposed"),
        ([[0.9, 0.8, 0.7]], 0.0, [3], "worth it"),  # free positions: all of them
        ([[0.9, 0.8, 0.7]], 0.1, [0], "not worth it"),  # a position costs as much as a step
        ([[0.9, 0.1, 0.05]], 0.004, [1], "worth it"),  # 1.9 in 18 ms against 2.0 in 22 ms
        ([[0.9, 0.8], [0.05], []], 0.002, [2, 0, 0], "worth it"),
        ([[0.01]], 0.0, [0], "not worth it"),  # gains less than drafting may cost
    ],
)
def test_throughput(offers: list[list[float]], per_token: float, counts: list[int], reason: str) -> None:
    decision = decide(offers, machine(per_token=per_token))
    assert (decision.counts, decision.reason) == (counts, reason)
    assert (decision.plain_seconds > 0) == (reason == "worth it")


falling = st.lists(st.floats(0.05, 0.99), max_size=3).map(lambda rates: chances(rates, range(-1, len(rates) - 1), 1.0))


@settings(max_examples=60)
@given(st.lists(falling, min_size=1, max_size=3), st.floats(0.0, 0.02))
def test_throughput_finds_what_exhaustive_search_finds(offers: list[list[float]], per_token: float) -> None:
    cost = machine(per_token=per_token)

    def rate(counts: tuple[int, ...]) -> float:
        tokens = len(offers) + sum(sum(offer[:count]) for offer, count in zip(offers, counts, strict=True))
        return tokens / cost.predict(StepWork(len(offers) + sum(counts)))

    best = max(rate(counts) for counts in itertools.product(*(range(len(offer) + 1) for offer in offers)))
    none = rate((0,) * len(offers))
    decision = decide(offers, cost)
    if sum(decision.counts):
        assert rate(tuple(decision.counts)) == pytest.approx(best)
    else:
        assert best <= none * LEAST_GAIN * 1.001


def test_fixed_takes_what_there_is() -> None:
    offers = [Offer([0.1] * 5, 0), Offer([0.1], 0), Offer([], 0)]
    assert Fixed(3).decide(offers, StepWork(3), machine()).counts == [3, 1, 0]


@pytest.mark.parametrize(("per_token", "rate", "best"), [(0.0, 0.9, 8), (0.05, 0.3, 0)])
def test_the_bandit_finds_the_better_length(per_token: float, rate: float, best: int) -> None:
    cost, bandit = machine(per_token=per_token), Bandit()
    chosen = []
    for _ in range(300):
        decision = bandit.decide([Offer([rate**i for i in range(1, 9)], 0)], StepWork(1), cost)
        [count] = decision.counts
        tokens = 1 + sum(rate**i for i in range(1, count + 1))
        bandit.observe(decision, round(tokens * 100), 100 * cost.predict(StepWork(1 + count)))
        chosen.append(count)
    assert chosen[-100:].count(best) > 85


def test_the_bandit_tries_no_length_that_nobody_has_drafts_for() -> None:
    cost, bandit = machine(per_token=0.05), Bandit()
    chosen = []
    for _ in range(300):
        decision = bandit.decide([Offer([0.3, 0.09, 0.03], 0)], StepWork(1), cost)
        [count] = decision.counts
        tokens = 1 + sum(0.3**i for i in range(1, count + 1))
        bandit.observe(decision, round(tokens * 100), 100 * cost.predict(StepWork(1 + count)))
        chosen.append(count)
    assert chosen[-100:].count(0) > 85


def observe(acceptance: Acceptance, evidence: int, tried: int, right: int) -> None:
    """Tells that the first ``right`` draft tokens of a chain of ``tried`` were right."""
    acceptance.observe([(evidence, position, position < right) for position in range(min(right + 1, tried))])


def test_acceptance_converges_by_evidence_and_position() -> None:
    acceptance = Acceptance(num_evidence=2, positions=4)
    assert acceptance.rates([1], [0]) > acceptance.rates([0], [0])
    for turn in range(2000):  # half the first are right, then always two more, never four
        observe(acceptance, 1, tried=4, right=(turn % 2) * 3)
    rates = acceptance.rates([1] * 4, range(4))
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.0], abs=0.12)
    assert acceptance.rates([0], [0]) == [pytest.approx(0.4)]


def test_acceptance_tells_siblings_apart_by_their_evidence() -> None:
    acceptance = Acceptance(num_evidence=3, positions=2)
    for turn in range(2000):  # after a right draft token, the likely one of two is right three times in four
        acceptance.observe([(2, 0, True), (1, 1, turn % 4 != 0), (0, 1, turn % 4 == 0)])
    assert acceptance.rates([2, 1, 0], [0, 1, 1]) == pytest.approx([1.0, 0.75, 0.25], abs=0.12)


def test_acceptance_follows_a_change_within_200_observations() -> None:
    """Also at positions that are hardly seen any more, because the first draft token is always wrong now."""
    acceptance = Acceptance(1, 4)
    for _ in range(500):
        observe(acceptance, 0, 4, 4)
    assert min(acceptance.rates([0] * 4, range(4))) > 0.95
    for _ in range(200):
        observe(acceptance, 0, 4, 0)
    rates = acceptance.rates([0] * 4, range(4))
    assert rates[0] < 0.1 and max(rates) < 0.5
    for _ in range(200):
        observe(acceptance, 0, 1, 1)
    assert min(acceptance.rates([0] * 4, range(4))) > 0.75


def test_a_request_can_differ_from_the_others() -> None:
    own = OwnAcceptance()
    assert own.factor() == 1.0
    for _ in range(20):
        own.observe(0.8, False)
    assert own.factor() < 0.5
    for _ in range(40):
        own.observe(0.4, True)
    assert own.factor() > 1.2


@given(st.data(), st.lists(st.floats(0, 1), max_size=8), st.floats(0, 3))
def test_chances_fall(data: st.DataObject, rates: list[float], factor: float) -> None:
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(len(rates))]
    result = chances(rates, parents, factor)
    assert all(0 <= own <= (result[parent] if parent >= 0 else 1) for own, parent in zip(result, parents, strict=True))
