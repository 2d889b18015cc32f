from time import perf_counter

import pytest

from slipstream.loadtest.harness import connect
from slipstream.loadtest.scrape import (
    Load,
    Speculation,
    Steps,
    parse_load,
    parse_speculation,
    parse_steps,
    read_load,
    wait_idle,
)

PAGE = """\
# TYPE {p}:num_requests_running gauge
{p}:num_requests_running{{engine="0"}} 2.0
{p}:num_requests_running{{engine="1"}} 1.0
{p}:num_requests_waiting 4
{p}:num_requests_waiting_by_reason{{reason="capacity"}} 9
{p}:kv_cache_usage_perc 0.25
# TYPE {p}:num_preemptions counter
{p}:num_preemptions_total 7
"""


@pytest.mark.parametrize("prefix", ["slipstream", "vllm"])
def test_gauges_are_read_and_summed_over_engines(prefix):
    load = parse_load(PAGE.format(p=prefix))
    assert load == Load(running=3, waiting=4, kv_cache_usage=0.25, preemptions=7)
    assert not load.idle


def test_how_full_the_cache_is_is_read_where_it_is_told():
    blocks = "".join(
        f"slipstream:kv_blocks_{name} {count}\n" for name, count in (("total", 8), ("used", 1), ("cached", 5))
    )
    load = parse_load(PAGE.format(p="slipstream") + blocks)
    assert load is not None and load.kv_cache_filled == 0.75


@pytest.mark.parametrize("left_over", [(1, 0, 0), (0, 1, 0), (0, 0, 0.01)])
def test_anything_left_over_is_not_idle(left_over):
    assert not Load(*left_over, preemptions=0).idle
    assert Load(0, 0, 0, preemptions=5).idle


def test_other_pages_have_no_load():
    assert parse_load("process_cpu_seconds_total 5\nother:num_requests_running 0\n") is None


STEPS = """\
# TYPE slipstream:engine_steps counter
slipstream:engine_steps_total{model_name="m"} 10
# TYPE slipstream:step_seconds counter
slipstream:step_seconds_total{model_name="m"} 0.25
# TYPE slipstream:scheduler_cpu_seconds counter
slipstream:scheduler_cpu_seconds_total{model_name="m"} 0.004
"""


def test_steps_are_read_and_subtracted():
    steps = parse_steps(STEPS)
    assert steps == Steps(10, 0.25, 0.004)
    assert steps - Steps(4, 0.1, 0.001) == Steps(6, 0.15, 0.003)
    assert parse_steps(PAGE.format(p="slipstream")) is None


DRAFTS = """\
# TYPE slipstream:spec_decode_num_drafts counter
slipstream:spec_decode_num_drafts_total{drafter="ngram"} 10
slipstream:spec_decode_num_drafts_total{drafter="suffix"} 5
# TYPE slipstream:spec_decode_num_draft_tokens counter
slipstream:spec_decode_num_draft_tokens_total{drafter="ngram"} 40
# TYPE slipstream:spec_decode_num_accepted_tokens counter
slipstream:spec_decode_num_accepted_tokens_total{drafter="ngram"} 30
slipstream:spec_decode_num_accepted_tokens_per_pos_total{drafter="ngram",position="0"} 9
"""


def test_drafts_are_summed_over_drafters():
    assert parse_speculation(DRAFTS) == Speculation(15, 40, 30)
    assert Speculation(15, 40, 30) - Speculation(5, 10, 20) == Speculation(10, 30, 10)
    assert parse_speculation(STEPS) is None


async def test_wait_idle_returns_when_idle_or_out_of_time(serve):
    async with serve() as server, connect(server.url) as target:
        load = await wait_idle(target.client, 300)
        assert load is not None and load.idle
        server.leak = 1
        start = perf_counter()
        load = await wait_idle(target.client, 0.3)
        assert load is not None and load.running == 1
        assert perf_counter() - start >= 0.3


async def test_a_server_without_metrics_has_no_load(serve):
    async with serve(gauges=False) as server, connect(server.url) as target:
        assert await read_load(target.client) is None
