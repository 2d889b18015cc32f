"""When drafting pauses, and that it comes back."""

from __future__ import annotations

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
        self.planner = GuessPlanner(EngineConfig(), 10_000, self.kv, cost)
        self.request = Request(
            NewRequest(request_id=1, prompt=[1, 2, 3], params=SamplingParams(max_tokens=9000)), 0.0, b""
        )
        self.kv.admit(self.request, 0)
        self.request.slot = 0

    def step(self, chance: float) -> bool:
        """Whether guesses were wanted; the next offer has this chance."""
        request = self.request
        request.num_computed = len(request.tokens) - 1
        builder = PlanBuilder()
        self.kv.grow(request, len(request.tokens))
        builder.add(request, 1)
        self.planner.plan(builder, prompts_wait=False)
        wanted = self.planner.wanted(request)
        plan = builder.build(1, [], [wanted])
        request.in_flight = 0
        request.tokens.append(5)
        request.offer = (chance,) if wanted else ()
        drafting = STEP_SECONDS / 2 if wanted else 0.0
        result = StepResult([[5]], [request.offer], {}, {}, {}, STEP_SECONDS, drafting)
        self.planner.observe(plan, builder.decision, result)
        return wanted > 0


def test_drafting_pauses_where_it_does_not_pay_and_comes_back() -> None:
    loop = Loop()
    assert loop.step(0.1)
    for _ in range(20):
        loop.step(0.1)
    paused = [loop.step(0.1) for _ in range(4 * PROBE_EVERY)]
    assert sum(paused) == 4  # probes
    for _ in range(4 * PROBE_EVERY):
        loop.step(0.95)
    assert all(loop.step(0.95) for _ in range(50))
