"""When drafting pauses, and that it comes back."""

from __future__ import annotations

from random import Random

import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.kv.manager import KVManager
from slipstream.engine.messages import NewRequest, SamplingParams
from slipstream.engine.plan import StepResult
from slipstream.engine.plan_builder import PlanBuilder
from slipstream.engine.request import Request
from slipstream.engine.speculation.planner import PROBE_EVERY, GuessPlanner
from slipstream.engine.step_cost import StepCost, StepWork

STEP_SECONDS = 0.01


class Loop:
    """One request whose drafter needs half a step for a proposal."""

    def __init__(self) -> None:
        cost = StepCost()
        cost.calibrate([(StepWork(n), STEP_SECONDS) for n in (1, 2, 4, 8, 16)], [])
        self.kv = KVManager(1000, 16, prefix_caching=False)
        self.planner = GuessPlanner(EngineConfig(), 10_000, 10_000, self.kv, cost)
        self.request = Request(
            NewRequest(request_id=1, prompt=[1, 2, 3], params=SamplingParams(max_tokens=9000)), 0.0, b""
        )
        self.kv.admit(self.request, 0)
        self.request.slot = 0

    def step(self, chance: float, right: bool) -> bool:
        """Whether guesses were wanted; the next offer has this chance, and what is verified is right or not."""
        request = self.request
        request.num_computed = len(request.tokens) - 1
        builder = PlanBuilder()
        self.kv.grow(request, len(request.tokens))
        builder.add(request, 1)
        self.planner.plan(builder, prompts_wait=False)
        wanted = self.planner.wanted(request)
        plan = builder.build(1, [], [wanted])
        request.in_flight = 0
        verified = builder.decision is not None and builder.decision.counts[0]
        drawn = [5, 5] if verified and right else [5]
        request.tokens += drawn
        request.offer = (chance,) if wanted else ()
        drafting = STEP_SECONDS / 2 if wanted else 0.0
        result = StepResult([drawn], [request.offer], {}, {}, {}, STEP_SECONDS, drafting)
        self.planner.observe(plan, builder.decision, result)
        return wanted > 0


@pytest.mark.parametrize("promise", [0.1, 0.95])
def test_drafting_pauses_where_it_does_not_pay_and_comes_back(promise: float) -> None:
    """Whatever is promised: what counts is what comes of it."""
    loop = Loop()
    assert loop.step(promise, right=False)
    for _ in range(20):
        loop.step(promise, right=False)
    paused = [loop.step(promise, right=False) for _ in range(4 * PROBE_EVERY)]
    assert sum(paused) == 4  # probes
    for _ in range(6 * PROBE_EVERY):
        loop.step(promise, right=True)
    assert all(loop.step(promise, right=True) for _ in range(50))


def test_some_wrong_guesses_do_not_stop_a_drafter_that_pays() -> None:
    loop, random = Loop(), Random(0)
    wanted = [loop.step(0.8, right=random.random() < 0.8) for _ in range(2000)]
    assert sum(wanted) > 1900
