"""Whose turn it is: priorities, starvation, and what tenants learn of one another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.config import EngineConfig
from slipstream.engine.plan import StepWork
from slipstream.engine.testing.local import SimulatedLoop, simulated_answer

VOCAB = 40
CONFIG = EngineConfig(max_running=8, max_step_tokens=64, block_size=16)


def Loop(config: EngineConfig = CONFIG, *sizes: int, **options: Any) -> SimulatedLoop:  # noqa: N802
    return SimulatedLoop(config, *sizes, vocab_size=VOCAB, **options)


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
    assert loop.tokens(1) == simulated_answer([1] * 8, 30)
