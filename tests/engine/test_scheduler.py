"""The scheduler alone, with a simulated model that checks every read of the cache."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import NewRequest, SamplingParams, SpeculationParams, TokenDelta
from slipstream.engine.plan import StepPlan
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.step_cost import StepCost, StepWork
from slipstream.engine.testing import SimulatedRunner, simulated_token

VOCAB = 40
CONFIG = EngineConfig(max_running=8, max_step_tokens=64, block_size=16)


class Loop:
    """The step loop with `ahead` plans under way before the first is committed; ahead 0 is the plain loop."""

    def __init__(
        self,
        config: EngineConfig = CONFIG,
        num_blocks: int = 30,
        max_len: int = 200,
        ahead: int = 0,
        right: float | None = None,
    ) -> None:
        self.now = 0.0
        self.cost = StepCost()
        self.scheduler = Scheduler(config, num_blocks, max_len, self.cost, clock=lambda: self.now)
        self.runner = SimulatedRunner(num_blocks, config.block_size, VOCAB, right)
        self.plans: list[StepPlan] = []
        self.told: dict[int, list[TokenDelta]] = {}
        self._ahead = ahead
        self._queue: deque[StepPlan] = deque()

    def add(self, request_id: int, prompt: list[int], max_tokens: int = 5, **fields: object) -> None:
        stop = fields.pop("stop_token_ids", ())
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)  # type: ignore[arg-type]
        self.now += 0.001
        self.told[request_id] = []
        self.scheduler.add(
            NewRequest(request_id=request_id, prompt=prompt, params=params, arrival=self.now, **fields)  # type: ignore[arg-type]
        )

    def step(self) -> StepPlan | None:
        self.now += 0.01
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            self._queue.append(plan)
        if self._queue and (len(self._queue) > self._ahead or plan is None):
            done = self._queue.popleft()
            self._tell(self.scheduler.commit(done, self.runner.execute(done)))
        else:
            self._tell(self.scheduler.take_ended())
        self.scheduler.check_integrity()
        return plan

    def finish(self, most: int = 5000) -> None:
        for _ in range(most):
            if not self.scheduler.has_work and not self._queue:
                break
            self.step()
        else:
            raise AssertionError("the scheduler does not come to an end")
        assert self.scheduler.kv.pool.num_used == 0

    def tokens(self, request_id: int) -> list[int]:
        return [token for delta in self.told[request_id] for token in delta.tokens]

    def reason(self, request_id: int) -> str | None:
        return self.told[request_id][-1].finish_reason if self.told[request_id] else None

    def _tell(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            told = self.told[delta.request_id]
            assert not told or told[-1].finish_reason is None, "a request was told something after its end"
            told.append(delta)


def expected(prompt: list[int], max_tokens: int, stop: tuple[int, ...] = (), max_len: int = 200) -> list[int]:
    history = list(prompt)
    while len(history) - len(prompt) < max_tokens and len(history) < max_len:
        history.append(simulated_token(history, VOCAB))
        if history[-1] in stop:
            break
    return history[len(prompt) :]


prompts = st.builds(
    lambda shared, own: list(range(shared)) + own,
    st.sampled_from([0, 16, 32, 37, 64]),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
)
arrivals = st.tuples(
    prompts,
    st.integers(0, 60),  # max_tokens
    st.sampled_from([-1, 0, 0, 1]),  # priority
    st.sampled_from(["", "", "salt"]),
    st.sampled_from([(), (3,), (1, 2)]),  # stop tokens
)
actions = st.lists(
    st.one_of(arrivals, st.just("step"), st.just("step"), st.integers(0, 30).map(lambda i: ("abort", i))),
    min_size=1,
    max_size=60,
)


@settings(max_examples=150)
@given(
    actions=actions,
    num_blocks=st.integers(13, 40),
    loop_kind=st.sampled_from([(0, None), (1, None), (2, None), (0, 0.2), (0, 0.8), (0, 1.0)]),
    policy=st.sampled_from(["throughput", "bandit", "fixed"]),
    max_running=st.integers(1, 8),
    chunked=st.booleans(),
    caching=st.booleans(),
)
def test_whatever_happens_every_request_gets_its_tokens_and_one_end(
    actions: list,
    num_blocks: int,
    loop_kind: tuple[int, float | None],
    policy: Any,
    max_running: int,
    chunked: bool,
    caching: bool,
) -> None:
    config = replace(
        CONFIG,
        max_running=max_running,
        chunked_prefill=chunked,
        prefix_caching=caching,
        speculation_policy=policy,
    )
    ahead, right = loop_kind  # guesses are for the plain loop
    loop = Loop(config, num_blocks, max_len=200, ahead=ahead, right=right)
    requests: dict[int, tuple] = {}
    aborted = set()
    for action in actions:
        if action == "step":
            loop.step()
        elif action[0] == "abort":
            loop.scheduler.abort([action[1]])
            aborted.add(action[1])
            loop.scheduler.check_integrity()
        else:
            prompt, max_tokens, priority, salt, stop = action
            request_id = len(requests)
            requests[request_id] = action
            loop.add(request_id, prompt, max_tokens, priority=priority, cache_salt=salt, stop_token_ids=stop)
    loop.finish()
    for request_id, (prompt, max_tokens, _, _, stop) in requests.items():
        wanted = expected(prompt, max_tokens, stop)
        tokens = loop.tokens(request_id)
        ends = [delta.finish_reason for delta in loop.told[request_id] if delta.finish_reason]
        assert len(ends) == 1
        if ends == ["abort"]:
            assert request_id in aborted and tokens == wanted[: len(tokens)]
        else:
            assert tokens == wanted
            assert ends == ["stop" if wanted[-1:] and wanted[-1] in stop else "length"]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_prompt_that_fills_the_context_can_be_computed(ahead: int, chunked: bool) -> None:
    config = replace(CONFIG, chunked_prefill=chunked)
    loop = Loop(config, num_blocks=13, max_len=200, ahead=ahead, right=None if ahead else 1.0)
    for request_id in range(3):
        loop.add(request_id, list(range(200)), max_tokens=0)
    loop.finish()
    for request_id in range(3):
        [delta] = loop.told[request_id]
        assert (delta.tokens, delta.finish_reason) == ([], "length")
    assert loop.scheduler.stats().generation_tokens == 0


def test_the_last_delta_says_what_only_the_engine_knows() -> None:
    """Also of a request that somebody else ends."""
    loop = Loop(num_blocks=13, max_len=200)
    loop.add(1, list(range(60)), max_tokens=100)
    loop.add(2, list(range(60)), max_tokens=100, priority=1)
    while loop.scheduler.stats().preemptions == 0:
        loop.step()
    scheduled = {request_id: loop.told[request_id][0].scheduled_at for request_id in (1, 2)}
    loop.scheduler.abort([1, 2])
    loop.finish()
    last = [loop.told[request_id][-1] for request_id in (1, 2)]
    assert [delta.finish_reason for delta in last] == ["abort", "abort"]
    assert sum(delta.num_preemptions for delta in last) == loop.scheduler.stats().preemptions > 0
    assert [delta.scheduled_at for delta in last] == list(scheduled.values())


def test_right_guesses_save_steps_and_the_limits_hold() -> None:
    config = replace(CONFIG, speculation_policy="fixed", max_draft_tokens=4)
    loop = Loop(config, right=1.0)
    loop.add(1, [1, 2, 3], max_tokens=30)
    loop.finish()
    assert loop.tokens(1) == expected([1, 2, 3], 30)
    drafted = sum(delta.num_drafted for delta in loop.told[1])
    accepted = sum(delta.num_accepted for delta in loop.told[1])
    assert drafted == accepted > 10
    assert len(loop.told[1]) == 30 - accepted
    assert max(plan.drafts[0] for plan in loop.plans) == 4
    limited = Loop(config, right=1.0)
    limited.add(1, [1, 2, 3], max_tokens=30, speculation=SpeculationParams("auto", 2))
    limited.add(2, [1, 2, 3], max_tokens=30, speculation=SpeculationParams("off"))
    limited.finish()
    assert max(delta.num_drafted for delta in limited.told[1]) == 2
    assert all(delta.num_drafted == 0 for delta in limited.told[2])


def test_steps_that_prompts_share_verify_nothing() -> None:
    config = replace(CONFIG, speculation_policy="fixed", max_draft_tokens=4)
    loop = Loop(config, num_blocks=60, right=1.0)
    loop.add(1, [1, 2, 3], max_tokens=100)
    for _ in range(6):
        loop.step()
    loop.add(2, [7] * 190, max_tokens=2)
    loop.finish()
    shared = [plan for plan in loop.plans if len(plan.counts) > 1 and max(plan.counts) > 5]
    assert shared and not any(sum(plan.drafts) for plan in shared)
    assert any(sum(plan.drafts) for plan in loop.plans)


def test_guesses_never_push_a_request_out() -> None:
    """Blocks that only guesses need are not worth a preemption."""
    config = replace(CONFIG, speculation_policy="fixed", max_draft_tokens=8, prefix_caching=False)
    loop = Loop(config, num_blocks=4, right=1.0)
    for request_id in range(2):
        loop.add(request_id, [request_id] * 10, max_tokens=22)  # two full blocks each
    loop.finish()
    assert [loop.tokens(i) for i in range(2)] == [expected([i] * 10, 22) for i in range(2)]
    assert all(delta.num_preemptions == 0 for told in loop.told.values() for delta in told)


def test_streams_keep_running_beside_a_long_prompt() -> None:
    loop = Loop(num_blocks=60)
    for request_id in range(4):
        loop.add(request_id, [request_id] * 5, max_tokens=50)
    loop.step()
    loop.add(9, [7] * 190, max_tokens=2)
    for _ in range(3):
        plan = loop.step()
        assert plan is not None and plan.counts.count(1) == 4 and len(plan.counts) == 5


def test_chunks_are_as_long_as_the_latency_target_allows() -> None:
    config = replace(CONFIG, step_latency_ms=20, max_step_tokens=512)
    loop = Loop(config, num_blocks=200, max_len=2000)
    loop.cost.calibrate(
        [(StepWork(n), 0.005 + n * 0.0001) for n in (1, 16, 64, 512)], [(StepWork(16, 0, 10**6), 0.0066)]
    )
    loop.cost.observe = lambda *_: None  # the simulated steps take no time
    loop.add(1, [1] * 5, max_tokens=50)
    loop.step()
    loop.add(2, [2] * 1500)
    plan = loop.step()
    assert plan is not None and 130 <= plan.counts[1] <= 149  # 5 ms + 150 tokens of 0.1 ms, one of them the stream's
    assert loop.cost.predict(plan.work) <= 0.020


def test_prompts_advance_whatever_the_target() -> None:
    loop = Loop(replace(CONFIG, step_latency_ms=0.001), num_blocks=60)
    loop.cost.calibrate([(StepWork(1), 0.001), (StepWork(512), 100.0)], [(StepWork(1, 0, 10**6), 200.0)])
    loop.add(1, [1] * 5, max_tokens=50)
    loop.step()
    loop.add(2, [2] * 60)
    plan = loop.step()
    assert plan is not None and plan.counts == [1, 16]


def test_without_chunking_a_prompt_is_computed_whole() -> None:
    loop = Loop(replace(CONFIG, chunked_prefill=False), num_blocks=60)
    loop.add(1, [1] * 5, max_tokens=50)
    loop.step()
    loop.add(2, [2] * 180)
    plan = loop.step()
    assert plan is not None and plan.counts == [1, 180]


def test_equal_prompts_are_computed_once() -> None:
    """The n samples of one prompt, or of one group in RL, wait for the first of them to compute it."""
    loop = Loop(num_blocks=60)
    prompt = list(range(37)) + [1] * 20
    for request_id in range(6):
        loop.add(request_id, prompt, max_tokens=3)
    loop.finish()
    # One whole prompt, then the tail after the last full block for each of the others, and two decode steps each.
    assert loop.runner.tokens_computed <= len(prompt) + 5 * (len(prompt) - 48) + 6 * 2
    assert len({tuple(loop.tokens(request_id)) for request_id in range(6)}) == 1


def test_short_prompts_overtake_long_ones_and_urgent_ones_overtake_both() -> None:
    loop = Loop(replace(CONFIG, max_running=1), num_blocks=60)
    loop.cost.calibrate([(StepWork(1), 0.01), (StepWork(512), 5.0)], [(StepWork(1, 0, 10**6), 5.1)])
    loop.add(0, [9] * 5, max_tokens=3)
    loop.step()
    loop.add(1, [1] * 150, max_tokens=1)
    loop.add(2, [2] * 5, max_tokens=1)
    loop.add(3, [3] * 150, max_tokens=1, priority=-1)
    loop.finish()
    order = sorted((1, 2, 3), key=lambda request_id: loop.told[request_id][0].scheduled_at)
    assert order == [3, 2, 1]


def test_nothing_starves_behind_a_stream_of_urgent_requests() -> None:
    config = replace(CONFIG, max_running=1, priority_step_s=5.0)
    loop = Loop(config, num_blocks=60)
    loop.add(0, [5] * 8, max_tokens=1, priority=2)
    arrivals = {0: loop.now}
    while loop.reason(0) is None:
        request_id = len(arrivals)
        assert request_id < 5000
        loop.add(request_id, [request_id % VOCAB] * 8, max_tokens=2)
        arrivals[request_id] = loop.now
        loop.step()
    served_before = [arrivals[request_id] for request_id, told in loop.told.items() if told and request_id]
    assert 9.9 < max(served_before) - arrivals[0] < 10.1  # two levels of five seconds


@settings(max_examples=25)
@given(
    most_urgent=st.integers(-3, 0),
    priorities=st.lists(st.sampled_from([-1000, -3, 0, 0, 5, 1000]), min_size=1, max_size=6),
    size=st.integers(1, 20),
    max_running=st.integers(1, 2),
)
def test_no_allowed_priority_delays_others_beyond_its_head_start(
    most_urgent: int, priorities: list[int], size: int, max_running: int
) -> None:
    """However many requests a caller sends, and whatever priorities of those the server allows: who came before them
    by more than the head start of the most urgent one (and the time its own prompt takes) waits for none of them.
    """
    step = 0.3
    config = replace(CONFIG, max_running=max_running, priority_step_s=step)
    loop = Loop(config, num_blocks=60)
    loop.add(0, [5] * 30, max_tokens=3)
    bound = loop.now - most_urgent * step + loop.cost.predict(StepWork().add(0, 30))
    arrivals = {0: loop.now}
    while loop.reason(0) is None:
        request_id = len(arrivals)
        assert request_id < 2000, "starved"
        loop.add(
            request_id, [request_id % VOCAB] * size, priority=max(priorities[request_id % len(priorities)], most_urgent)
        )
        arrivals[request_id] = loop.now
        loop.step()
    # With two rows, the other one may hold a request that came later; with one row nobody passes.
    passed = [arrivals[other] for other, told in loop.told.items() if told and told[-1].finish_reason]
    assert max_running > 1 or max(passed) <= bound
    assert loop.told[0][-1].num_preemptions == 0 or most_urgent < 0


requests_of_tenants = st.lists(
    st.tuples(
        st.sampled_from(["", "a", "b", "a\0b", "('a', '"]),
        st.sampled_from(["", "s", "b\0s", "b"]),
        st.sampled_from([16, 32, 40, 64]),  # of a beginning that all share
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=30)
@given(requests=requests_of_tenants)
def test_no_tenant_learns_what_another_has_sent(requests: list[tuple[str, str, int]]) -> None:
    """What a tenant is told of the cache, and how much is computed for it, is what it would be on its own."""

    def run(chosen: list[int], scope: Any = "tenant") -> tuple[dict[int, int], int]:
        loop = Loop(replace(CONFIG, prefix_cache_scope=scope, max_running=16), num_blocks=200)
        for number in chosen:
            tenant, salt, length = requests[number]
            loop.add(number, list(range(length)), max_tokens=2, tenant=tenant, cache_salt=salt)
            loop.finish()
        return {number: loop.told[number][0].num_cached_tokens for number in chosen}, loop.runner.tokens_computed

    everybody, computed = run(list(range(len(requests))))
    alone = 0
    for tenant in {tenant for tenant, _, _ in requests}:
        own = [number for number, request in enumerate(requests) if request[0] == tenant]
        cached, tokens = run(own)
        assert cached == {number: everybody[number] for number in own}
        alone += tokens
    assert computed == alone
    shared, less = run(list(range(len(requests))), "server")
    assert less <= computed and sum(shared.values()) >= sum(everybody.values())


def test_the_cache_of_a_server_is_shared_if_its_operator_says_so() -> None:
    for scope, hits in (("tenant", 0), ("server", 32)):
        loop = Loop(replace(CONFIG, prefix_cache_scope=scope))
        loop.add(1, list(range(32)), tenant="a")
        loop.finish()
        loop.add(2, [*range(32), 5], tenant="b")
        loop.finish()
        assert loop.told[2][0].num_cached_tokens == hits


def test_an_urgent_request_takes_the_place_of_an_unimportant_one() -> None:
    loop = Loop(replace(CONFIG, max_running=2), num_blocks=60)
    loop.add(1, [1] * 8, max_tokens=30, priority=1)
    loop.add(2, [2] * 8, max_tokens=30)
    loop.step()
    loop.add(3, [3] * 8, max_tokens=2)
    loop.finish()
    assert loop.told[1][-1].num_preemptions == 1 and loop.told[2][-1].num_preemptions == 0
    assert loop.told[3][-1].num_preemptions == 0
    assert loop.tokens(1) == expected([1] * 8, 30)


def test_a_full_cache_pushes_out_the_latest_request() -> None:
    loop = Loop(num_blocks=13, ahead=1)
    for request_id in range(3):
        loop.add(request_id, [request_id] * 40, max_tokens=60)
    loop.finish()
    preempted = [loop.told[request_id][-1].num_preemptions for request_id in range(3)]
    assert preempted[0] == 0 and preempted[2] > 0
    for request_id in range(3):
        assert loop.tokens(request_id) == expected([request_id] * 40, 60)
    assert loop.scheduler.stats().preemptions == sum(preempted)


def test_the_context_limit_ends_a_request_with_length() -> None:
    loop = Loop(max_len=50, num_blocks=10, ahead=1)
    loop.add(1, [1] * 45, max_tokens=100)
    loop.finish()
    assert len(loop.tokens(1)) == 5 and loop.reason(1) == "length"


def test_stop_tokens_count_only_after_min_tokens() -> None:
    loop = Loop()
    prompt = [1] * 8
    every = tuple(range(VOCAB))
    params = SamplingParams(max_tokens=20, min_tokens=4, stop_token_ids=every)
    loop.told[1] = []
    loop.scheduler.add(NewRequest(request_id=1, prompt=prompt, params=params))
    loop.finish()
    last = loop.told[1][-1]
    assert len(loop.tokens(1)) == 4 and last.finish_reason == "stop" and last.stop_token == loop.tokens(1)[-1]


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "under way"])
def test_abort_in_any_state_frees_everything_at_once(when: str) -> None:
    loop = Loop(replace(CONFIG, max_running=1), num_blocks=20, ahead=1 if when == "under way" else 0)
    if when == "waiting":
        loop.add(0, [0] * 8, max_tokens=5)
    loop.add(1, [1] * 150, max_tokens=20)
    for _ in range({"waiting": 1, "prefilling": 1, "decoding": 5, "under way": 4}[when]):
        loop.step()
    loop.scheduler.abort([1, 77])
    held = loop.scheduler.kv.pool.num_used
    assert held == (1 if when == "waiting" else 0)
    loop.scheduler.abort([1])
    loop.finish()
    assert loop.reason(1) == "abort"


def test_stats_count_tokens_and_hits() -> None:
    loop = Loop()
    loop.add(1, list(range(32)), max_tokens=3)
    loop.finish()
    loop.add(2, [*range(32), 5], max_tokens=2)
    loop.finish()
    stats = loop.scheduler.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (65, 5)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (65, 32)
    assert loop.told[2][0].num_cached_tokens == 32
