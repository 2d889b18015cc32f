import asyncio
import math
from itertools import pairwise
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.loadtest.arrivals import ClosedLoop, OpenLoop, drive


@given(st.floats(0.01, 1000), st.integers(0, 100), st.integers(0, 5))
def test_poisson_arrivals_start_at_zero_rise_and_repeat_with_the_seed(rate, count, seed):
    offsets = OpenLoop(rate, seed).offsets(count)
    assert len(offsets) == count
    assert offsets == sorted(offsets)
    assert offsets[:1] == [0.0][:count]
    assert offsets == OpenLoop(rate, seed).offsets(count)


def test_poisson_gaps_are_exponential_with_the_rate():
    offsets = OpenLoop(50.0, seed=1).offsets(20_001)
    gaps = [later - earlier for earlier, later in pairwise(offsets)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    # Of an exponential law the deviation equals the mean, and 1 - 1/e of the gaps are shorter than it.
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.05)
    assert sum(gap < mean for gap in gaps) / len(gaps) == pytest.approx(1 - math.exp(-1), abs=0.02)
    assert offsets != OpenLoop(50.0, seed=2).offsets(20_001)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
async def test_closed_loop_keeps_exactly_so_many_under_way(count):
    running, most, sent = 0, 0, []

    async def send(item, due):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (item % 3))
        running -= 1
        sent.append(item)

    await drive(range(count), ClosedLoop(4), send)
    assert sorted(sent) == list(range(count))
    assert most == min(4, count)


async def test_open_loop_sends_when_due_however_long_answers_take():
    arrivals = OpenLoop(200.0, seed=3)
    dues, early = [], []
    all_sent = asyncio.Event()

    async def send(item, due):
        dues.append(due)
        early.append(due - perf_counter())
        if len(dues) == 40:
            all_sent.set()
        await all_sent.wait()  # no answer comes before the last request is sent

    async with asyncio.timeout(300):
        await drive(range(40), arrivals, send)
    assert [due - dues[0] for due in dues] == pytest.approx(arrivals.offsets(40))
    assert max(early) <= 0


async def test_infinite_rate_sends_all_at_once():
    running, all_sent = 0, asyncio.Event()

    async def send(item, due):
        nonlocal running
        running += 1
        if running == 50:
            all_sent.set()
        await all_sent.wait()  # no answer comes before the last request is sent

    async with asyncio.timeout(300):
        await drive(range(50), OpenLoop(math.inf), send)


def test_impossible_arrivals_are_refused():
    with pytest.raises(ValueError, match="concurrency"):
        ClosedLoop(0)
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="rate"):
            OpenLoop(rate)
