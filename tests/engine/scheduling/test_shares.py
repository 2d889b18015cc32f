"""Flows get their shares of the machine, whatever each of them sends; one flow alone is served by deadline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.config import EngineConfig
from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling import shares
from slipstream.engine.scheduling.prompts import SHARED_STEP_S, STANDING_BACK
from slipstream.engine.testing.local import SimulatedLoop

VOCAB = 40
CONFIG = EngineConfig(max_running=2, max_step_tokens=64, block_size=16)


def loop_of(config: EngineConfig = CONFIG) -> SimulatedLoop:
    loop = SimulatedLoop(config, 60, vocab_size=VOCAB)
    loop.cost.calibrate([(StepWork(1), 0.01), (StepWork(512), 0.5)], [(StepWork(1, 0, 10**6), 0.6)])
    return loop


def begun(loop: SimulatedLoop) -> list[int]:
    """The requests that have begun, in that order."""
    found = [(told[0].scheduled_at, number) for number, told in loop.told.items() if told]
    return [number for _, number in sorted(found)]


@settings(max_examples=30)
@given(
    flood=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4)), min_size=8, max_size=30),
    size=st.integers(1, 30),
    after=st.integers(0, 6),
)
def test_nobody_waits_for_what_another_flow_has_queued(flood: list[tuple[int, int]], size: int, after: int) -> None:
    loop = loop_of()
    for number, (length, tokens) in enumerate(flood):
        loop.add(number, [number % VOCAB] * length, max_tokens=tokens, flow="flood")
    for _ in range(after):
        loop.step()
    before = set(begun(loop))
    loop.add(1000, [7] * size, max_tokens=2, flow="quiet")
    loop.finish()
    order = begun(loop)
    passed = [number for number in order[: order.index(1000)] if number not in before]
    # What was in the rows already goes on; of the queue, at most one of each row's worth of work goes first.
    assert len(passed) <= 1 + CONFIG.max_running
    assert len(order) == len(flood) + 1


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_two_floods_get_their_shares_by_weight(weight: float) -> None:
    loop = loop_of(replace(CONFIG, max_running=1))
    for number in range(80):
        loop.add(2 * number, [number % VOCAB] * 20, max_tokens=3, flow="a", weight=weight)
        loop.add(2 * number + 1, [number % VOCAB] * 20, max_tokens=3, flow="b")
    while len(begun(loop)) < 60:
        loop.step()
    of_a = sum(number % 2 == 0 for number in begun(loop)) / 60
    assert of_a == pytest.approx(weight / (weight + 1), abs=0.05)


def test_who_was_away_gets_no_credit_and_who_was_alone_owes_nothing() -> None:
    loop = loop_of(replace(CONFIG, max_running=1))
    for number in range(40):
        loop.add(number, [number % VOCAB] * 20, max_tokens=3, flow="a")
    for _ in range(60):
        loop.step()
    late = len(begun(loop))
    for number in range(100, 140):
        loop.add(number, [number % VOCAB] * 20, max_tokens=3, flow="b")
    while len(begun(loop)) < late + 20:
        loop.step()
    of_a = sum(number < 100 for number in begun(loop)[late:])
    assert 8 <= of_a <= 12


def test_the_credit_of_who_was_away_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "CREDIT_S", 0.5)
    loop = loop_of(replace(CONFIG, max_running=1))
    loop.cost.observe = lambda *_: None  # type: ignore[method-assign]  # the simulated steps take no time
    for number in range(40):
        loop.add(number, [number % VOCAB] * 15, max_tokens=3, flow="a")
        loop.add(100 + number, [number % VOCAB] * 15, max_tokens=3, flow="c")
    while len(begun(loop)) < 50:
        loop.step()
    for number in range(200, 250):
        loop.add(number, [number % VOCAB] * 15, max_tokens=3, flow="b")
    cost = loop.cost.predict(StepWork().add(0, 15))
    while len(begun(loop)) < 90:
        loop.step()
    order = begun(loop)[50:]
    alone = next(place for place, number in enumerate(order[2:]) if number < 200)
    assert 0.3 * 0.5 / cost < alone < 2 + 0.5 / cost
    assert sum(number >= 200 for number in order[2 + alone :]) <= 2 + len(order[2 + alone :]) / 3


def test_urgent_requests_pass_other_flows_by_a_bounded_amount() -> None:
    loop = loop_of(replace(CONFIG, max_running=1, priority_step_s=0.08))
    for number in range(60):
        loop.add(number, [number % VOCAB] * 20, max_tokens=3, flow="a")
        loop.add(100 + number, [number % VOCAB] * 20, max_tokens=3, flow="b", priority=-1)
    while len(begun(loop)) < 60:
        loop.step()
    order = begun(loop)
    first = next(place for place, number in enumerate(order[1:]) if number < 100)
    assert 2 <= first <= 40  # so much work, then both in turn
    assert sum(number < 100 for number in order) >= 5


@given(requests=st.lists(st.tuples(st.integers(1, 100), st.integers(-2, 2)), min_size=1, max_size=10))
@settings(max_examples=20)
def test_one_flow_is_served_by_deadline_whatever_it_is_called(requests: list[tuple[int, int]]) -> None:
    orders = []
    for flow in ("", "a"):
        loop = loop_of(replace(CONFIG, max_running=1))
        for number, (length, priority) in enumerate(requests):
            loop.add(number, [number % VOCAB] * length, max_tokens=1, flow=flow, priority=priority)
        loop.finish()
        orders.append(begun(loop))
    assert orders[0] == orders[1]


def test_what_is_remembered_of_flows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "REMEMBERED_FLOWS", 3)
    loop = loop_of()
    for number in range(20):
        loop.add(number, [5] * 8, max_tokens=1, flow=f"flow {number}")
        loop.finish()
    assert len(loop.scheduler._waiting._used) == 3
    assert not loop.scheduler._waiting._open


BASE_S, TOKEN_S = 0.01, 0.0005


def flooded(arrivals: list[tuple[str, int]]) -> SimulatedLoop:
    """Streams of one flow, and prompts of it that wait, when requests come of flows, with prompts of these lengths."""
    loop = SimulatedLoop(replace(CONFIG, max_running=16, max_step_tokens=512), 1000, 1200, vocab_size=VOCAB)
    profile = [(StepWork(tokens), BASE_S + tokens * TOKEN_S) for tokens in (1, 16, 64, 512)]
    loop.cost.calibrate(profile, [(StepWork(16, 0, 10**6), 0.0181)])
    loop.cost.observe = lambda *_: None  # type: ignore[method-assign]  # the simulated steps take no time
    for number in range(6):
        loop.add(number, [number] * 10, max_tokens=300, flow="flood")
    loop.step()
    for number in range(6, 40):
        loop.add(number, [number, *[5] * 599], max_tokens=20, flow="flood")
    for _ in range(3):
        loop.step()
    for number, (flow, length) in enumerate(arrivals, 1000):
        loop.add(number, [number - 1000, *[7] * (length - 1)], max_tokens=4, flow=flow)
    return loop


def until_first_token(loop: SimulatedLoop, request_id: int) -> list[tuple[int, int, float]]:
    """For each step: positions of the request's prompt, of others', and the share of its time that streams had."""
    found = []
    owner: dict[int, int] = {}
    while not loop.told[request_id]:
        plan = loop.step()
        assert plan is not None
        owner |= {row.slot: row.request.request_id for row in plan.new}
        own = sum(count for slot, count in zip(plan.slots, plan.counts, strict=True) if owner.get(slot) == request_id)
        streams = plan.counts.count(1)
        share = (BASE_S + streams * TOKEN_S) / (BASE_S + plan.num_tokens * TOKEN_S) if streams else 0.0
        found.append((own, plan.num_tokens - streams - own, share))
    return found


@pytest.mark.parametrize("length", [30, 200, 1000])
def test_a_quiet_flows_prompt_is_computed_at_once_and_hardly_slower_than_alone(length: int) -> None:
    steps = until_first_token(flooded([("quiet", length)]), 1000)
    assert sum(own for own, _, _ in steps) == length
    assert all(own for own, _, _ in steps), "others' prompts are computed while this one waits"
    assert not any(others for _, others, _ in steps), "a step is filled up with others' prompts"
    # Streams of the flood stand back, or have at most 15 % of a step.
    assert steps[0][2] == 0 and all(share < 0.16 for _, _, share in steps[:-1])


def test_streams_do_not_stand_back_for_long() -> None:
    """However much comes of flows that each ask for little."""
    loop = flooded([("quiet", 200)])
    taken: list[float] = [0.0]
    for number in range(60):
        loop.add(2000 + number, [number, *[3] * 199], max_tokens=1, flow=f"quiet {number % 7}")
        plan = loop.step()
        assert plan is not None
        taken[-1] += BASE_S + plan.num_tokens * TOKEN_S
        if plan.counts.count(1) >= 6:
            taken.append(0.0)
    one = BASE_S + 6 * TOKEN_S
    # Then they have a step of which they take 15 %.
    assert len(taken) > 10 and max(taken) < (2 * STANDING_BACK + 2 / 0.15) * one


@pytest.mark.parametrize("lengths", [[300, 250, 200], [600, 60, 60]])
def test_a_quiet_flow_may_ask_for_more_at_once(lengths: list[int]) -> None:
    """Its requests do not wait until others have had as much."""
    loop = flooded([("quiet", 10)])
    while len([number for number in begun(loop) if number < 40]) < 12:
        loop.step()
    for number, length in enumerate(lengths, 2000):
        loop.add(number, [number - 2000, *[9] * (length - 1)], max_tokens=4, flow="quiet")
    steps = until_first_token(loop, 2002)
    prompts = [own + others for own, others, _ in steps]
    assert sum(prompts[:-1]) <= sum(lengths), "others' prompts take their share of the time"


def test_streams_keep_their_pace_while_prompts_of_their_own_flow_are_computed() -> None:
    loop = flooded([])
    steps = [until_first_token(loop, number) for number in (6, 7)]
    assert all(share > 0.38 for step in steps for _, _, share in step)


def test_streams_keep_their_pace_while_two_floods_have_prompts() -> None:
    loop = flooded([("another", 600)] * 20)
    steps = until_first_token(loop, 1002)
    assert all(share > 0.38 for _, _, share in steps)
    assert sum(bool(own) for own, _, _ in steps) < len(steps)


@pytest.mark.parametrize("others", [0, 1])
def test_steps_full_of_a_floods_prompts_are_short_once_another_flow_was_seen(others: int) -> None:
    """Who comes next waits for one of them; without others nobody does."""
    loop = SimulatedLoop(replace(CONFIG, max_running=16, max_step_tokens=512), 1000, 1200, vocab_size=VOCAB)
    loop.cost.calibrate([(StepWork(tokens), BASE_S + tokens * TOKEN_S) for tokens in (1, 16, 64, 512)], [])
    loop.cost.observe = lambda *_: None  # type: ignore[method-assign]
    for number in range(1000, 1000 + others):
        loop.add(number, [1] * 10, flow="quiet")
        loop.finish()
    for number in range(40):
        loop.add(number, [number, *[5] * 599], max_tokens=1, flow="flood")
    plan = loop.step()
    assert plan is not None
    most = int((SHARED_STEP_S - BASE_S) / TOKEN_S)
    assert plan.num_tokens in ((most - 1, most) if others else (512,))
    loop.finish()
