import asyncio
import os
from collections import Counter
from mmap import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from slipstream.clients.errors import ClientError
from slipstream.loadtest.harness import connect
from slipstream.loadtest.soak import (
    MIB,
    SoakOptions,
    memory_problem,
    memory_samples,
    memory_trend,
    plan_trials,
    print_soak,
    soak,
)
from slipstream.loadtest.workloads import Workload, WorkloadOptions

FAST = {"requests": 60, "concurrency": 16, "max_output_tokens": 20, "settle": 0.3}


@pytest.fixture
def serve(serve, time_of_waiting):
    return serve


async def test_a_sound_server_passes_and_every_request_has_one_end(serve):
    async with serve(ttft=0.02, pace=0.004) as server, connect(server.url) as target:
        result = await soak(target, SoakOptions(**FAST, abort_share=0.5))
        assert server.running == 0
        assert server.most_running == 16
    assert result["problems"] == []
    cut = result["cut_before_first_token"] + result["cut_mid_stream"]
    assert result["finished"] + cut == 60
    assert result["cut_before_first_token"] > 0 and result["cut_mid_stream"] > 0
    assert 0 < server.disconnects <= cut  # some cuts fall on the last byte of the answer
    assert result["finish_reasons"] == {"length": result["finished"]}
    assert result["memory"] is None
    console = Console(record=True, width=100)
    print_soak(result, console)
    assert "60 at 16 concurrent" in console.export_text()


async def test_work_left_over_is_a_problem(serve):
    async with serve() as server, connect(server.url) as target:
        server.on_request = lambda: setattr(server, "leak", 1)
        result = await soak(target, SoakOptions(**FAST))
    assert len(result["problems"]) == 1
    assert "not idle" in result["problems"][0]


@pytest.mark.parametrize("fault", ["error", "break", "mid-error", "no-finish", "two-finishes"])
async def test_a_request_that_ends_wrongly_is_a_problem(serve, fault):
    async with serve() as server, connect(server.url) as target:
        server.fault = fault
        result = await soak(target, SoakOptions(**FAST, abort_share=0))
    assert (result["failed"], result["finished"]) == (1, 59)
    assert len(result["problems"]) == 1


async def test_a_busy_server_or_one_without_gauges_is_refused(serve):
    async with serve(leak=1) as server, connect(server.url) as target:
        with pytest.raises(ClientError, match="busy"):
            await soak(target, SoakOptions(**FAST))
    async with serve(gauges=False) as server, connect(server.url) as target:
        with pytest.raises(ClientError, match="metrics"):
            await soak(target, SoakOptions(**FAST))


async def test_trials_repeat_with_the_seed_and_are_broken_off_in_three_ways():
    async def plan(seed):
        return await plan_trials(SoakOptions(requests=400, seed=seed), Workload(WorkloadOptions(seed=seed)))

    trials = await plan(0)
    assert trials == await plan(0) != await plan(1)
    kinds = Counter((trial.chunks is not None, trial.seconds is not None) for trial in trials)
    assert kinds[False, False] == pytest.approx(280, abs=40)
    assert all(kinds[kind] == pytest.approx(40, abs=20) for kind in ((True, False), (False, True), (True, True)))
    lengths = [trial.request.body["max_tokens"] for trial in trials]
    assert min(lengths) >= 1 and max(lengths) <= 128 and len(set(lengths)) > 80
    assert sum(len(trial.request.body["messages"][0]["content"]) > 5000 for trial in trials) > 5


@given(st.floats(-0.5, 0.5), st.integers(100, 5000), st.integers(10, 100))
def test_memory_trend_finds_the_slope(slope, start, count):
    sizes = [int((start + slope * second / 2) * MIB) for second in range(count)]
    samples = [(second / 2, {"one": size - MIB, "other": MIB}) for second, size in enumerate(sizes)]
    trend = memory_trend(samples)
    half = count - count // 2
    assert trend["growth_mib_per_minute"] == pytest.approx(slope * 60, abs=0.1)
    assert trend["growth_mib"] == pytest.approx(slope * (half - 1) / 2, abs=0.1)
    mean = start + slope * (count - 1 - (half - 1) / 2) / 2
    if abs(slope * (half - 1) / 2 - 0.02 * mean) > 0.5:
        assert trend["flat"] == (slope * (half - 1) / 2 < 0.02 * mean)


def test_growth_in_the_first_half_only_is_flat():
    samples = [(float(second), {"one": min(second, 50) * 10 * MIB}) for second in range(100)]
    assert memory_trend(samples)["flat"]
    assert not memory_trend([(time, {"one": int(time * MIB)}) for time, _ in samples])["flat"]
    assert memory_trend(samples[:5]) is None


def test_who_grew_is_told_and_whether_the_cache_was_still_filling():
    samples = [(float(second), {"one": second * MIB, "other": 9 * MIB}) for second in range(100)]
    samples[-1][1]["late"] = 5 * MIB
    trend = memory_trend(samples)
    assert trend["by_process"] == {"late": [0, 5], "one": [50, 99], "other": [9, 9]}
    assert memory_problem(trend, (0.4, 1.0)).endswith("40% of which was in use or kept before, 100% after")
    assert memory_problem(trend, (0.99, 1.0)) == memory_problem(trend, (None, None))
    assert "KV" not in memory_problem(trend, (None, None))
    assert memory_problem(trend | {"flat": True}, (0.4, 1.0)) is None


async def test_memory_of_a_process_is_sampled(monkeypatch):
    monkeypatch.setattr("slipstream.loadtest.soak.SAMPLE_SECONDS", 0.02)
    async with memory_samples(os.getpid()) as samples:

        async def more():
            """Waits for two samples, of which the second began after now."""
            enough = len(samples) + 2
            while len(samples) < enough:
                await asyncio.sleep(0.01)

        await more()
        ballast = mmap(-1, 64 * MIB)  # pages of its own, whatever memory the process has left over
        ballast.write(b"x" * (64 * MIB))
        await more()
    # Other tests may have left this process children of its own, whose memory is told apart.
    first, last = (
        next(size for name, size in sizes.items() if name.endswith(f" {os.getpid()}"))
        for sizes in (samples[0][1], samples[-1][1])
    )
    assert last - first > 50 * MIB
    del ballast


def test_an_unknown_process_is_refused():
    with pytest.raises(ValueError, match="no process"):
        SoakOptions(pid=2**22 + 1)
