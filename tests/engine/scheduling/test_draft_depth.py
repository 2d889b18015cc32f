import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.draft_depth import DraftDepth
from slipstream.engine.scheduling.step_cost import StepCost

MOST = 8


def cost_of(slope: float) -> StepCost:
    """A step of one token takes 1 s, and ``slope`` s more for each token more."""
    cost = StepCost()
    cost.calibrate([(StepWork(n), 1 + slope * (n - 1)) for n in (1, 2, 4, 8, 16, 32, 64, 128)], [])
    return cost


def settled(
    rate: float, each: float, slope: float, rows: int = 1, steps: int = 100, first: float = 0.0
) -> tuple[DraftDepth, int]:
    """What is asked for after so many steps; draft tokens are right at this rate, ``each`` takes so long, and the first
    so much longer."""
    depth, cost, asked = DraftDepth(MOST), cost_of(slope), MOST
    for _ in range(steps):
        offers = [tuple(rate ** (i + 1) for i in range(asked))] * rows
        depth.observe(asked, offers, first + each * asked)
        asked = depth.best(rows, StepWork(rows), 0.0, cost)
    return depth, asked


def rate_per_second(depth: int, rate: float, each: float, slope: float, rows: int, first: float) -> float:
    tokens = rows * (1 + sum(rate ** (i + 1) for i in range(depth)))
    return tokens / (1 + slope * (rows * (1 + depth) - 1) + first + each * depth)


@given(st.floats(0.1, 0.95), st.floats(0.0, 0.5), st.floats(0.0, 0.5), st.integers(1, 8), st.floats(0.0, 0.5))
def test_what_is_asked_for_brings_most_tokens_per_second(rate, each, slope, rows, first):
    _, asked = settled(rate, each, slope, rows, steps=5, first=first)
    best = max(rate_per_second(depth, rate, each, slope, rows, first) for depth in range(1, MOST + 1))
    assert rate_per_second(asked, rate, each, slope, rows, first) == pytest.approx(best, rel=1e-6)


def test_what_chains_take_is_told_by_requests():
    depth, _ = settled(0.9, each=0.01, slope=0.01, rows=3, first=0.5)
    assert depth.table() == {2: pytest.approx([0.5 + 0.01 * (i + 1) for i in range(MOST)])}
    assert DraftDepth(MOST).table() == {}


def test_a_dear_first_draft_token_makes_the_others_no_dearer():
    assert settled(0.9, each=0.01, slope=0.01, first=0.5)[1] == MOST


def test_dear_drafting_is_short_and_cheap_drafting_long():
    assert settled(0.6, each=0.2, slope=0.1)[1] == 1
    assert settled(0.6, each=0.0, slope=0.0)[1] == MOST
    assert 1 < settled(0.8, each=0.05, slope=0.02)[1] < MOST


def test_it_grows_again_when_drafts_get_better_though_only_the_first_is_seen():
    depth, asked = settled(0.3, each=0.08, slope=0.1)
    assert asked == 1
    for _ in range(400):
        depth.observe(asked, [tuple(0.9 ** (i + 1) for i in range(asked))], 0.08 * asked)
        asked = depth.best(1, StepWork(1), 0.0, cost_of(0.1))
    assert asked > 2


def test_lookups_say_nothing_about_networks():
    depth = DraftDepth(MOST)
    depth.observe(2, [(0.9,) * 8, ()], 1.0)
    assert depth.best(2, StepWork(2), 0.0, cost_of(0.1)) == MOST
    depth.observe(2, [(0.9,) * 8, (0.1, 0.01)], 1.0)
    assert depth.best(2, StepWork(2), 0.0, cost_of(0.1)) == 1


def test_one_interruption_does_not_count_for_much():
    depth, asked = settled(0.8, each=0.05, slope=0.02)
    depth.observe(asked, [tuple(0.8 ** (i + 1) for i in range(asked))], 100.0)
    assert abs(depth.best(1, StepWork(1), 0.0, cost_of(0.02)) - asked) <= 1


def test_nothing_known_asks_for_all_there_may_be():
    assert DraftDepth(5).best(3, StepWork(3), 0.0, cost_of(0.1)) == 5
    assert np.isfinite(settled(0.0, each=0.1, slope=0.1)[1])
