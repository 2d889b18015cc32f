"""Offline requests get what others leave: a share of their steps, and the machine where nobody else wants it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.plan import StepPlan, StepWork
from slipstream.engine.scheduling.step_cost import StepCost
from slipstream.engine.testing.local import SimulatedLoop

VOCAB = 40
CONFIG = EngineConfig(max_running=8, max_step_tokens=64, block_size=16)


class FixedCost(StepCost):
    """A step takes 10 ms and 1 ms for each position, whatever is observed."""

    def predict(self, work: StepWork) -> float:
        return 0.01 + 0.001 * work.tokens

    def observe(self, work: StepWork, seconds: float) -> None:
        pass


def loop_of(config: EngineConfig = CONFIG, ahead: int = 0, num_blocks: int = 120) -> SimulatedLoop:
    loop = SimulatedLoop(config, num_blocks, vocab_size=VOCAB, ahead=ahead)
    cost = FixedCost()
    loop.scheduler.cost = loop.scheduler._offline._cost = cost
    return loop


def prompt(number: int, length: int = 20) -> list[int]:
    return [number % VOCAB] * length


def seconds(plan: StepPlan) -> float:
    return 0.01 + 0.001 * sum(plan.counts)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_they_prolong_steps_of_others_by_their_share_on_average_and_get_that(share: float, ahead: int) -> None:
    loop = loop_of(replace(CONFIG, offline_share=share), ahead)
    for number in range(2):
        loop.add(number, prompt(number), max_tokens=160)
    while not all(map(loop.told.get, range(2))):
        loop.step()
    for number in range(10, 18):
        loop.add(number, prompt(number), max_tokens=150, offline=True)
    before = len(loop.plans)
    while not any(map(loop.reason, range(2))):
        loop.step()
    mixed = loop.plans[before:]
    plain, taken = 0.012 * len(mixed), sum(map(seconds, mixed)) - 0.012 * len(mixed)
    # Whoever began with something saved may have spent that, and what is saved at the end is not spent.
    assert taken == pytest.approx(share * plain, abs=0.02)
    loop.finish()
    assert {loop.reason(number) for number in loop.told} == {"length"}


def test_they_stand_still_while_prompts_of_others_wait() -> None:
    loop = loop_of(replace(CONFIG, offline_share=1.0, max_step_tokens=16))
    for number in range(10, 14):
        loop.add(number, prompt(number), max_tokens=50, offline=True)
    while not all(map(loop.told.get, range(10, 14))):
        loop.step()
    loop.add(0, prompt(0, 100), max_tokens=3)
    before = {number: len(loop.tokens(number)) for number in range(10, 14)}
    while not loop.told[0]:
        loop.step()
    assert {number: len(loop.tokens(number)) for number in range(10, 14)} == before
    loop.finish()


def test_alone_they_use_steps_of_about_the_time_allowed() -> None:
    loop = loop_of(replace(CONFIG, max_running=64, max_step_tokens=512, offline_step_ms=40.0))
    for number in range(64):
        loop.add(number, prompt(number), max_tokens=4, offline=True)
    loop.finish()
    longest = max(map(seconds, loop.plans))
    assert 0.035 <= longest <= 0.05
    assert len(loop.plans) >= 64 * 24 / 40


def test_they_give_their_rows_and_blocks_to_whoever_comes() -> None:
    loop = loop_of(replace(CONFIG, max_running=2), num_blocks=8)
    for number in range(10, 14):
        loop.add(number, prompt(number), max_tokens=40, offline=True)
    for _ in range(5):
        loop.step()
    for number in range(2):
        loop.add(number, prompt(number, 40), max_tokens=5)
    loop.step()
    assert all(loop.scheduler._requests[number].slot >= 0 for number in range(2))
    loop.finish()
    assert {loop.reason(number) for number in loop.told} == {"length"}


def test_the_least_urgent_of_others_goes_before_them_however_long_they_have_waited() -> None:
    loop = loop_of(replace(CONFIG, max_running=1))
    for number in range(10, 14):
        loop.add(number, prompt(number), max_tokens=2, offline=True)
    loop.now += 1e6
    for number in range(4):
        loop.add(number, prompt(number), max_tokens=2, priority=1000, flow="another" if number % 2 else "")
    loop.finish()
    begun = sorted(loop.told, key=lambda number: loop.told[number][0].scheduled_at)
    assert set(begun[:4]) == set(range(4))


def test_nobody_waits_for_a_beginning_that_an_offline_request_computes() -> None:
    loop = loop_of(replace(CONFIG, max_step_tokens=16))
    loop.add(10, prompt(1, 100), max_tokens=2, offline=True)
    loop.step()
    loop.add(0, prompt(1, 100), max_tokens=2)
    loop.step()
    assert loop.scheduler._requests[0].slot >= 0
    loop.finish()


def test_what_a_sender_has_computed_offline_costs_nothing_of_the_share_of_his_others() -> None:
    loop = loop_of(replace(CONFIG, max_running=1))
    for number in range(100, 130):
        loop.add(number, prompt(number), max_tokens=3, flow="a", offline=True)
    for _ in range(60):
        loop.step()
    for number in range(20):
        loop.add(2 * number, prompt(number), max_tokens=3, flow="a")
        loop.add(2 * number + 1, prompt(number), max_tokens=3, flow="b")
    begun: list[int] = []
    while len(begun) < 20:
        loop.step()
        begun = [number for number in range(40) if loop.told[number]]
    assert 8 <= sum(number % 2 == 0 for number in begun) <= 12
