"""The scheduler alone, with a simulated model that checks every read of the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import NewRequest, SamplingParams, SpeculationParams
from slipstream.engine.plan import StepWork
from slipstream.engine.testing.local import SimulatedLoop, simulated_answer

VOCAB = 40
CONFIG = EngineConfig(max_running=8, max_step_tokens=64, block_size=16)


def Loop(config: EngineConfig = CONFIG, *sizes: int, **options: Any) -> SimulatedLoop:  # noqa: N802
    return SimulatedLoop(config, *sizes, vocab_size=VOCAB, **options)


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
    st.sampled_from([False, False, True]),  # offline
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
    ahead=st.sampled_from([0, 1, 1, 2]),
    right=st.sampled_from([None, 0.2, 0.8, 1.0]),
    switch_length=st.sampled_from([0, 0, 50]),
    max_len=st.sampled_from([200, 70, 70]),
    policy=st.sampled_from(["throughput", "bandit", "fixed"]),
    max_running=st.integers(1, 8),
    chunked=st.booleans(),
    caching=st.booleans(),
)
def test_whatever_happens_every_request_gets_its_tokens_and_one_end(
    actions: list,
    num_blocks: int,
    ahead: int,
    right: float | None,
    switch_length: int,
    max_len: int,
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
    loop = Loop(config, num_blocks, max_len=max_len, ahead=ahead, right=right, switch_length=switch_length)
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
            prompt, max_tokens, priority, salt, stop, offline = action
            prompt, request_id = prompt[: max_len - 1], len(requests)
            requests[request_id] = prompt, max_tokens, stop
            fields = {"priority": priority, "cache_salt": salt, "stop_token_ids": stop, "offline": offline}
            loop.add(request_id, prompt, max_tokens, **fields)
    loop.finish()
    for request_id, (prompt, max_tokens, stop) in requests.items():
        wanted = simulated_answer(prompt, max_tokens, stop, max_len)
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
    loop = Loop(config, num_blocks=13, max_len=200, ahead=ahead, right=1.0)
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


def test_accepted_drafts_save_steps_and_the_limits_hold() -> None:
    config = replace(CONFIG, speculation_policy="fixed", max_draft_tokens=4)
    loop = Loop(config, right=1.0)
    loop.add(1, [1, 2, 3], max_tokens=30)
    loop.finish()
    assert loop.tokens(1) == simulated_answer([1, 2, 3], 30)
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


def test_drafts_never_push_a_request_out() -> None:
    """Blocks that only draft tokens need are not worth a preemption."""
    config = replace(CONFIG, speculation_policy="fixed", max_draft_tokens=8, prefix_caching=False)
    loop = Loop(config, num_blocks=4, right=1.0)
    for request_id in range(2):
        loop.add(request_id, [request_id] * 10, max_tokens=22)  # two full blocks each
    loop.finish()
    assert [loop.tokens(i) for i in range(2)] == [simulated_answer([i] * 10, 22) for i in range(2)]
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


def test_a_full_cache_pushes_out_the_latest_request() -> None:
    loop = Loop(num_blocks=13, ahead=1)
    for request_id in range(3):
        loop.add(request_id, [request_id] * 40, max_tokens=60)
    loop.finish()
    preempted = [loop.told[request_id][-1].num_preemptions for request_id in range(3)]
    assert preempted[0] == 0 and preempted[2] > 0
    for request_id in range(3):
        assert loop.tokens(request_id) == simulated_answer([request_id] * 40, 60)
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
