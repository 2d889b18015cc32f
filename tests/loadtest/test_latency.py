from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from slipstream.clients.errors import ClientError
from slipstream.loadtest.harness import connect
from slipstream.loadtest.latency import (
    PrefixOptions,
    StallOptions,
    gaps_overlapping,
    gaps_within,
    prefix,
    print_prefix,
    print_stall,
    stall,
)
from slipstream.loadtest.record import RequestRecord

times = st.lists(st.integers(0, 100), max_size=20, unique=True).map(sorted)


@given(st.lists(times, max_size=4), st.integers(0, 100), st.integers(1, 50))
def test_gaps_of_a_window(all_times, start, length):
    end = start + length
    records = [RequestRecord(due=0, start=0, chunk_times=[float(time) for time in each]) for each in all_times]
    within = gaps_within(records, start, end)
    overlapping = gaps_overlapping(records, start, end)
    expected = sum(1 for each in all_times for one, two in pairwise(each) if one < end and two > start)
    assert len(overlapping) == expected
    assert len(within) <= len(overlapping)
    assert all(gap <= length for gap in within)
    assert sum(within) <= length * len(records)


@pytest.fixture
def serve(serve, time_that_leaps):
    return serve


QUICK = {"streams": 3, "long_tokens": 300, "rounds": 2, "window": 0.15}


async def test_a_stall_is_seen_in_the_window_of_the_long_prompt_only(serve):
    async with serve(pace=0.005, prefill=0.003, stalls=True) as server, connect(server.url) as target:
        result = await stall(target, None, StallOptions(**QUICK))
    assert result["long_tokens"] >= 300
    assert result["p99_itl_without_ms"] <= 150, "longer than the window"
    assert result["max_itl_with_ms"] > 890
    assert result["p99_itl_with_ms"] > 800
    assert result["p99_itl_ratio"]["min"] > 3
    assert result["long_ttft_ms"] > 900
    assert len(result["rounds"]) == 2
    assert server.running == 0
    assert server.disconnects == 6


async def test_no_stall_is_seen_where_there_is_none(serve):
    async with serve(pace=0.005, prefill=0.003) as server, connect(server.url) as target:
        result = await stall(target, None, StallOptions(**QUICK))
    assert result["long_ttft_ms"] > 900
    assert result["p99_itl_with_ms"] < 0.8 * result["long_ttft_ms"]


async def test_both_servers_of_a_stall_get_the_same_prompts(serve):
    async with (
        serve(pace=0.005, prefill=0.004) as chunked,
        serve(pace=0.005, prefill=0.002, stalls=True) as whole,
        connect(chunked.url) as target,
        connect(whole.url) as other,
    ):
        result = await stall(target, other, StallOptions(**QUICK))
    texts = [sorted(str(body.get("messages")) for body in server.bodies) for server in (chunked, whole)]
    assert texts[0] == texts[1]
    assert 1.2 < result["long_ttft_ratio"]["median"] < 3
    assert len(result["whole_rounds"]) == 2
    console = Console(record=True, width=100)
    print_stall(result, console)
    assert "without chunking" in console.export_text()


async def test_streams_that_end_too_early_are_an_error(serve, monkeypatch):
    monkeypatch.setattr("slipstream.loadtest.latency.STREAM_TOKENS", 10)
    async with serve(pace=0.005, prefill=0.001) as server, connect(server.url) as target:
        with pytest.raises(ClientError, match="ended before"):
            await stall(target, None, StallOptions(**QUICK))


async def test_prefix_sends_each_prompt_twice(serve):
    async with serve(prefill=0.002, cache=True) as server, connect(server.url) as target:
        result = await prefix(target, PrefixOptions(prefix_tokens=200, rounds=3))
    prompts = [body["messages"][0]["content"] for body in server.bodies[1:]]
    assert prompts[0::2] == prompts[1::2]
    assert len(set(prompts)) == 3
    assert result["first_ttft_ms"] > 400
    assert result["ratio"]["min"] > 2
    console = Console(record=True)
    print_prefix(result, console)
    assert "first/second" in console.export_text()
