"""When drafting pauses, and that it comes back."""

from __future__ import annotations

from random import Random

import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import DrafterStats, NewRequest, SamplingParams
from slipstream.engine.plan import StepResult, StepWork
from slipstream.engine.scheduling.draft_planner import LONGEST_PAUSE, PROBE_DRAFTS, PROBE_EVERY, DraftPlanner
from slipstream.engine.scheduling.kv.manager import KVManager
from slipstream.engine.scheduling.plan_builder import PlanBuilder
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.step_cost import StepCost
from slipstream.engine.speculation.protocol import DraftNeeds

STEP_SECONDS = 0.01


class Loop:
    """One request whose drafter needs half a step for a proposal; it is the only one, costly or not."""

    def __init__(self, is_costly: bool = False) -> None:
        cost = StepCost()
        cost.calibrate([(StepWork(n), STEP_SECONDS) for n in (1, 2, 4, 8, 16)], [])
        self.kv = KVManager(1000, 16, prefix_caching=False)
        self.planner = DraftPlanner(EngineConfig(), 10_000, 10_000, self.kv, cost, DraftNeeds(8, costly=is_costly))
        self.is_costly = is_costly
        self.drafters: list[DrafterStats] = []
        self.most = 0
        """Draft tokens that were wanted of it after the last step."""
        self.request = Request(
            NewRequest(request_id=1, prompt=[1, 2, 3], params=SamplingParams(max_tokens=9000)), 0.0, b""
        )
        self.kv.admit(self.request, 0)
        self.request.slot = 0

    def step(self, chance: float, right: bool) -> bool:
        """Whether draft tokens were wanted; the next offer has this chance, and what is verified is right or not."""
        request = self.request
        request.num_computed = len(request.tokens) - 1
        builder = PlanBuilder()
        self.kv.grow(request, len(request.tokens))
        builder.add(request, 1)
        self.planner.plan(builder, prompts_wait=False)
        wanted = self.planner.wanted(request)
        plan = builder.build(1, [], [wanted], self.planner.costly_drafts)
        if self.is_costly:
            wanted = min(wanted, plan.costly_drafts)
        self.most = wanted
        request.in_flight = request.unsure = 0
        verified = builder.decision is not None and builder.decision.counts[0]
        sampled = [5, 5] if verified and right else [5]
        request.tokens += sampled
        request.offer = (chance,) if wanted else ()
        drafting = STEP_SECONDS / 2 if wanted else 0.0
        drafted = plan.drafts
        result = StepResult([sampled], drafted, [request.offer], {}, {}, {}, STEP_SECONDS, drafting, self.drafters)
        self.planner.observe(plan, builder.decision, result)
        return wanted > 0


@pytest.mark.parametrize("promise", [0.1, 0.95])
def test_lookups_pause_where_they_do_not_pay_and_come_back(promise: float) -> None:
    """Whatever is promised: what counts is what comes of it."""
    loop = Loop()
    assert loop.step(promise, right=False)
    for _ in range(20):
        loop.step(promise, right=False)
    paused = [loop.step(promise, right=False) for _ in range(4 * (PROBE_EVERY + 1))]
    assert sum(paused) == 4  # probes
    for _ in range(6 * (PROBE_EVERY + 1)):
        loop.step(promise, right=True)
    assert all(loop.step(promise, right=True) for _ in range(50))


@pytest.mark.parametrize("promise", [0.1, 0.95])
def test_a_costly_drafter_that_does_not_pay_is_asked_ever_less(promise: float) -> None:
    loop = Loop(is_costly=True)
    for _ in range(30):
        loop.step(promise, right=False)
    asked = [loop.step(promise, right=False) for _ in range(20 * LONGEST_PAUSE)]
    assert sum(asked[:LONGEST_PAUSE]) in (4, 6, 8), "16, 32, 64 steps apart"
    assert sum(asked[-10 * LONGEST_PAUSE :]) <= 20, "a probe is two steps, the second of which is measured"
    assert loop.planner.reasons["does not pay"] > 19 * LONGEST_PAUSE
    probes = []
    while len(probes) < 2:
        if loop.step(promise, right=False):
            probes.append(loop.most)
    assert all(1 <= most <= PROBE_DRAFTS for most in probes)
    for _ in range(2 * LONGEST_PAUSE):
        loop.step(promise, right=True)
    assert all(loop.step(promise, right=True) for _ in range(50)) and loop.most >= 1


def test_a_new_version_is_tried_at_once() -> None:
    loop = Loop(is_costly=True)
    loop.drafters = [DrafterStats("head", accepted_per_position=[], routes={"": 1})]
    for _ in range(2000):
        loop.step(0.9, right=False)
    loop.drafters = [DrafterStats("head", accepted_per_position=[], routes={"": 2})]
    loop.step(0.9, right=False)
    for _ in range(10 * (PROBE_EVERY + 2)):
        loop.step(0.9, right=True)
    assert all(loop.step(0.9, right=True) for _ in range(50))


def test_a_version_on_trial_shows_what_it_knows_also_where_none_pays() -> None:
    loop = Loop(is_costly=True)
    loop.drafters = [DrafterStats("head", accepted_per_position=[], routes={"": 1, "canary": 2})]
    for _ in range(2000):
        loop.step(0.1, right=False)
    found = [loop.most for _ in range(10 * PROBE_EVERY) if loop.step(0.1, right=False)]
    assert 9 <= len(found) <= 13


@pytest.mark.parametrize("is_costly", [False, True])
def test_some_rejected_drafts_do_not_stop_a_drafter_that_pays(is_costly: bool) -> None:
    loop, random = Loop(is_costly), Random(0)
    wanted = [loop.step(0.8, right=random.random() < 0.8) for _ in range(2000)]
    assert sum(wanted) > 1900
