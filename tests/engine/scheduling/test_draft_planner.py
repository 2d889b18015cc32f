"""When drafting pauses, and that it comes back."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec
import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import DrafterStats, NewRequest, SamplingParams
from slipstream.engine.plan import StepPlan, StepResult, StepWork
from slipstream.engine.scheduling.draft_planner import (
    CATCH_UP,
    PLAIN_EVERY,
    PLAIN_EVERY_SURE,
    PROBE_DRAFTS,
    PROBE_ROWS,
    DraftPlanner,
)
from slipstream.engine.scheduling.draft_worth import LONGEST_PAUSE, PROBE_EVERY
from slipstream.engine.scheduling.kv.manager import KVManager
from slipstream.engine.scheduling.plan_builder import PlanBuilder
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.step_cost import StepCost
from slipstream.engine.speculation.protocol import DraftNeeds

STEP_SECONDS = 0.01


class Loop:
    """Requests whose drafter needs half a step for a proposal; it is the only one, costly or not."""

    def __init__(self, is_costly: bool = False, routes: Sequence[str] = ("",), prompt: int = 3) -> None:
        self.cost = StepCost()
        self.expect(STEP_SECONDS)
        self.kv = KVManager(4000, 16, prefix_caching=False)
        needs = DraftNeeds(8, costly=is_costly)
        self.planner = DraftPlanner(EngineConfig(), 40_000, 40_000, self.kv, self.cost, needs)
        self.is_costly = is_costly
        self.seconds = STEP_SECONDS
        """How long steps take."""
        self.drafting = STEP_SECONDS / 2
        """Seconds that asking for all requests takes."""
        self.reading = 0.0
        """The same of a position that a drafter sees late."""
        self.drafters: list[DrafterStats] = []
        self.prompts_wait = False
        """Whether the step after each is taken up by prompts."""
        self.most = 0
        """Draft tokens that were wanted for a request after the last step."""
        self.asked: dict[int, int] = {}
        """The requests for which there were any, and how many positions the drafter saw first."""
        self._shown: dict[int, int] = {}
        params = SamplingParams(max_tokens=35_000)
        self.requests = [
            Request(NewRequest(request_id=slot, prompt=[1] * prompt, params=params, route=route), 0.0, b"")
            for slot, route in enumerate(routes)
        ]
        for slot, request in enumerate(self.requests):
            self.kv.admit(request, 0)
            request.slot = slot

    def expect(self, seconds: float) -> None:
        """Steps of any size are taken to be so long."""
        self.cost.calibrate([(StepWork(n), seconds) for n in (1, 2, 4, 8, 16, 64, 256)], [])

    def step(self, chance: float, right: bool) -> bool:
        """Whether draft tokens were wanted; the next offers have this chance, and what is verified is right or not."""
        builder = PlanBuilder()
        for request in self.requests:
            request.num_computed = len(request.tokens) - 1
            self.kv.grow(request, len(request.tokens))
            builder.add(request, 1)
        self.planner.plan(builder, prompts_wait=False)
        plan = builder.build(1, [], *self.planner.wants(builder, self.prompts_wait))
        wanted = plan.costly if self.is_costly else plan.wanted
        self.most, self.asked = max(wanted), {}
        sampled = []
        for row, request in enumerate(self.requests):
            request.in_flight = request.unsure = 0
            verified = builder.decision is not None and builder.decision.counts[row]
            sampled.append([5, 5] if verified and right else [5])
            request.tokens += sampled[-1]
            request.offer = (chance,) if wanted[row] else ()
            if wanted[row]:
                self.asked[row] = len(request.tokens) - self._shown.get(row, 0)
                self._shown[row] = len(request.tokens)
        return self._observe(builder, plan, sampled)

    def prompt(self, seconds: float) -> None:
        """A step that computes the prompt of another request, for so long: it verifies nothing."""
        builder = PlanBuilder()
        other = Request(NewRequest(request_id=99, prompt=[1] * 200, params=SamplingParams(max_tokens=9)), 0.0, b"")
        self.kv.admit(other, 0)
        other.slot, self.asked = 99, {}
        builder.add(other, 200)
        self.planner.plan(builder, prompts_wait=True)
        plan = builder.build(1, [], *self.planner.wants(builder, True))
        usual, self.seconds = self.seconds, seconds
        self._observe(builder, plan, [[5]])
        self.seconds = usual
        self.kv.free(other)

    def _observe(self, builder: PlanBuilder, plan: StepPlan, sampled: list[list[int]]) -> bool:
        drafting = self.drafting * len(self.asked) / len(self.requests)
        drafting += self.reading * sum(count - 1 for count in self.asked.values())
        offers = [request.offer for request in builder.requests]
        result = StepResult(sampled, plan.drafts, offers, {}, {}, {}, self.seconds, drafting, self.drafters)
        self.planner.observe(plan, builder.decision, result)
        return bool(self.asked)


@pytest.mark.parametrize("promise", [0.1, 0.95])
def test_lookups_pause_where_they_do_not_pay_and_come_back(promise: float) -> None:
    """Whatever is promised: what counts is what comes of it."""
    loop = Loop()
    loop.drafting = STEP_SECONDS / 20
    assert loop.step(promise, right=False)
    for _ in range(40):
        loop.step(promise, right=False)
    paused = [loop.step(promise, right=False) for _ in range(4 * (PROBE_EVERY + 1))]
    assert sum(paused) == 4  # probes
    for _ in range(6 * (PROBE_EVERY + 1)):
        loop.step(promise, right=True)
    assert all(loop.step(promise, right=True) for _ in range(50))


def test_steps_expected_to_be_far_longer_do_not_pass_for_a_gain() -> None:
    """As after a start on a busy machine."""
    loop = Loop()
    loop.expect(20 * STEP_SECONDS)
    for _ in range(6):
        loop.step(0.95, right=False)
    loop.expect(STEP_SECONDS)
    asked = [loop.step(0.95, right=False) for _ in range(60)]
    assert sum(asked[-20:]) <= 2


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


def test_probes_in_which_much_is_to_be_read_are_further_apart() -> None:
    """Reading what came since takes as long as many steps, however few draft tokens are asked for."""
    quick, slow = Loop(is_costly=True), Loop(is_costly=True)
    slow.reading = STEP_SECONDS / 200
    steps = 10 * LONGEST_PAUSE
    for loop in (quick, slow):
        for _ in range(200):
            loop.step(0.9, right=False)
    reading = [sum(slow.asked.values()) for _ in range(steps) if slow.step(0.9, right=False)]
    assert sum(quick.step(0.9, right=False) for _ in range(steps)) > len(reading) >= 2 * steps // LONGEST_PAUSE


def test_steps_without_draft_tokens_are_measured_while_there_are_others() -> None:
    """Expected to take a tenth longer than they do, they let drafting pass for a gain where it is a loss."""
    loop = Loop(is_costly=True)
    loop.drafting = STEP_SECONDS / 20
    loop.expect(1.1 * STEP_SECONDS)
    asked = [loop.step(0.9, right=False) for _ in range(60 * PLAIN_EVERY)]
    assert sum(asked[:PLAIN_EVERY]) > PLAIN_EVERY // 2
    assert sum(asked[-10 * PLAIN_EVERY :]) < PLAIN_EVERY


def test_a_long_prompt_is_not_read_for_a_few_last_tokens() -> None:
    loop = Loop(is_costly=True, routes=["", ""], prompt=1000)
    for most, asked in ((10, {1}), (25, {0, 1})):
        loop.requests[0].message = msgspec.structs.replace(
            loop.requests[0].message, params=SamplingParams(max_tokens=most)
        )
        loop.step(0.9, right=True)
        assert set(loop.asked) == asked


def test_a_probe_that_succeeds_goes_on_at_once() -> None:
    loop = Loop(is_costly=True)
    for _ in range(2000):
        loop.step(0.9, right=False)
    while not loop.step(0.9, right=True):
        pass
    assert [loop.step(0.9, right=True) for _ in range(2)] == [True, False], "the second of two is measured"
    assert all(loop.step(0.9, right=True) for _ in range(PLAIN_EVERY // 2))


def test_nobody_is_asked_before_a_step_that_verifies_nothing() -> None:
    for loop in (Loop(), Loop(is_costly=True)):
        loop.prompts_wait = True
        assert not any(loop.step(0.9, right=True) for _ in range(PROBE_EVERY))
        loop.prompts_wait = False
        assert loop.step(0.9, right=True)


def test_a_version_on_trial_shows_what_it_knows_beside_prompts() -> None:
    loop = Loop(is_costly=True)
    loop.drafters = [DrafterStats("head", accepted_per_position=[], routes={"": 1, "trial": 2})]
    loop.prompts_wait = True
    assert sum(loop.step(0.9, right=True) for _ in range(4 * PROBE_EVERY)) in (4, 5)


def test_the_first_step_of_prompts_counts_with_the_streams_it_makes() -> None:
    """These are known only once the prompts are planned: what does not pay beside eight is not asked for eight."""
    loop = Loop(is_costly=True, routes=[""] * 8)
    for _ in range(100):
        loop.step(0.9, right=False)
    builder = PlanBuilder()
    loop.planner.plan(builder, prompts_wait=True)
    for request in loop.requests:
        request.num_computed = 0
        builder.add(request, len(request.tokens))
    assert not any(loop.planner.wants(builder, False)[1])


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


def test_of_a_version_that_comes_back_it_is_known_what_it_brings() -> None:
    loop = Loop(is_costly=True)
    for version in (1, 2):
        loop.drafters = [DrafterStats("head", accepted_per_position=[], routes={"": version})]
        for _ in range(1000):
            loop.step(0.9, right=False)
    for version in (1, 2, 1):
        loop.drafters = [DrafterStats("head", accepted_per_position=[], routes={"": version})]
        assert not any(loop.step(0.9, right=False) for _ in range(PROBE_EVERY))


def test_a_probe_of_many_requests_asks_a_few_and_finds_out_as_well() -> None:
    loop = Loop(is_costly=True, routes=[""] * 32)
    for _ in range(600):
        loop.step(0.9, right=False)
    probes = [dict(loop.asked) for _ in range(2 * LONGEST_PAUSE + 4) if loop.step(0.9, right=False)]
    assert len(probes) == 4
    for first, second in (probes[:2], probes[2:]):
        assert set(first) == set(second) and 0 < len(first) <= PROBE_ROWS
        assert sum(first.values()) <= CATCH_UP + len(first), "and the token that the step samples"
        assert all(count == 1 for count in second.values()), "it is measured, with nothing to catch up with"
    for _ in range(4 * LONGEST_PAUSE):
        loop.step(0.9, right=True)
    assert len(loop.asked) == 32, "it pays, and for all"
    for _ in range(100):
        loop.step(0.9, right=False)
    assert len(loop.asked) <= PROBE_ROWS


def test_a_probe_of_many_requests_does_not_take_a_drafter_for_one_that_pays() -> None:
    """Half a step of asking all of them is more than a draft token in three brings; asking a few of them is less."""
    loop, random = Loop(is_costly=True, routes=[""] * 32), Random(0)
    for _ in range(600):
        loop.step(0.9, right=False)
    asked = []
    for _ in range(8 * LONGEST_PAUSE):
        loop.step(0.9, right=random.random() < 0.33)
        asked.append(len(loop.asked))
    assert sum(asked) <= 32 * 8 * LONGEST_PAUSE // 20


def test_what_a_network_has_to_catch_up_with_is_spread_over_steps() -> None:
    loop = Loop(is_costly=True, routes=[""] * 32, prompt=300)
    seen: set[int] = set()
    for _ in range(32):
        assert loop.step(0.9, right=True)
        assert sum(count - 1 for count in loop.asked.values() if count > 10) <= CATCH_UP
        seen |= set(loop.asked)
    assert len(seen) == 32
    loop = Loop(is_costly=True, prompt=2 * CATCH_UP)
    assert loop.step(0.9, right=True), "a longer one is not left out"


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


def test_a_trial_beside_many_requests_asks_some_of_both_routes() -> None:
    loop = Loop(is_costly=True, routes=["", "", "", "canary"] * 16)
    loop.drafters = [DrafterStats("head", accepted_per_position=[], routes={"": 1, "canary": 2})]
    for _ in range(1000):
        loop.step(0.1, right=False)
    while not loop.step(0.1, right=False):
        pass
    routes = [loop.requests[row].message.route for row in loop.asked]
    assert routes.count("canary") == 16 and routes.count("") == 16


def test_what_does_not_pay_beside_many_is_tried_beside_few_and_known_beside_many() -> None:
    loop = Loop(is_costly=True, routes=[""] * 32)
    everybody = loop.requests
    for _ in range(600):
        loop.step(0.9, right=False)
    loop.requests = everybody[:2]
    assert sum(loop.step(0.9, right=True) for _ in range(100)) >= 100 - 100 // PLAIN_EVERY - 1
    loop.requests = everybody
    assert sum(loop.step(0.9, right=False) for _ in range(100)) <= 4, "a probe or two"


def test_what_a_step_takes_without_is_seen_while_it_is_not_sure_that_drafting_pays() -> None:
    """Else the time of steps without draft tokens is what is left of the time of those with them."""
    loop, random = Loop(is_costly=True), Random(0)
    wanted = [loop.step(0.6, right=random.random() < 0.62) for _ in range(3200)]
    assert 3200 // PLAIN_EVERY // 2 < wanted.count(False) < 3200 // 8
    for _ in range(200):
        loop.step(0.99, right=True)
    wanted = [loop.step(0.99, right=True) for _ in range(4 * PLAIN_EVERY_SURE)]
    assert wanted.count(False) == 4, "it is sure that it pays"


def test_bad_luck_of_one_request_does_not_stop_a_drafter_that_pays_a_little() -> None:
    """Half a step for a draft token that is right in 62 of 100 cases."""
    loop, random = Loop(is_costly=True), Random(0)
    wanted = [loop.step(0.62, right=random.random() < 0.62) for _ in range(4000)]
    assert sum(wanted) > 3400


def test_texts_of_which_little_is_known_do_not_stop_a_drafter_that_pays() -> None:
    """A third of a step for a draft token that is right in 25 to 75 of 100 cases, by the text: an eighth is gained."""
    wanted = 0
    for seed in range(3):
        loop, random = Loop(is_costly=True), Random(seed)
        loop.drafting = STEP_SECONDS / 3
        for _ in range(40):
            right = random.uniform(0.25, 0.75)
            loop.prompt(seconds=15 * STEP_SECONDS)
            wanted += sum(loop.step(right, right=random.random() < right) for _ in range(100))
    assert wanted > 0.8 * 3 * 40 * 100


@pytest.mark.parametrize("right", [0.4, 0.62])
def test_steps_of_prompts_do_not_hide_what_drafting_brings(right: float) -> None:
    """They take as long as many steps with draft tokens, and bring the same with and without."""
    loop, random = Loop(is_costly=True), Random(0)
    wanted = []
    for number in range(4000):
        if number % 100 == 0:
            loop.prompt(seconds=15 * STEP_SECONDS)
        wanted.append(loop.step(right, right=random.random() < right))
    assert sum(wanted) > 3400 if right > 0.5 else sum(wanted[1000:]) < 300, "half a step for a draft token"


@pytest.mark.parametrize("is_costly", [False, True])
@pytest.mark.parametrize("asking", [False, True])
def test_a_machine_that_stands_still_for_a_while_stops_no_drafter_that_pays(is_costly: bool, asking: bool) -> None:
    loop, random = Loop(is_costly), Random(1)

    def step() -> bool:
        return loop.step(0.6, right=random.random() < 0.6)

    loop.drafting = drafting = STEP_SECONDS / 10
    for _ in range(100):
        step()
    for _ in range(3):
        if asking and is_costly:
            loop.drafting = 5.0
        else:
            loop.seconds = 5.0
        step()
        loop.seconds, loop.drafting = STEP_SECONDS, drafting
        assert sum(step() for _ in range(200)) >= 190
