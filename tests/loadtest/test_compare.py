import subprocess
import sys
from functools import partial

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from slipstream.clients.errors import ClientError
from slipstream.loadtest.compare import METRICS, Rounds, compare, contrast, print_comparison
from slipstream.loadtest.harness import connect
from slipstream.loadtest.processes import ProcessTree
from slipstream.loadtest.workloads import Workload, WorkloadOptions

positive = st.floats(0.01, 1e4)


def figures(value):
    totals = {"completed": 1, "failed": 0, "total_output_tokens": 5, "token_counts": "usage", "errors": {}}
    return {**dict.fromkeys(METRICS, value), **totals}


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=9))
def test_ratios_are_of_equal_rounds_and_turn_over_with_the_sides(rounds):
    a, b = [figures(x) for x, _ in rounds], [figures(y) for _, y in rounds]
    forth, back = contrast(a, b)["metrics"], contrast(b, a)["metrics"]
    for name in METRICS:
        assert forth[name]["ratios"] == pytest.approx([x / y for x, y in rounds], abs=1e-4)
        assert forth[name]["ratio_min"] <= forth[name]["ratio"] <= forth[name]["ratio_max"]
        assert forth[name]["a"] == back[name]["b"]
        for ratio, inverse in zip(forth[name]["ratios"], back[name]["ratios"], strict=True):
            if min(ratio, inverse) > 0.05:
                assert ratio * inverse == pytest.approx(1, rel=1e-2)


def test_a_metric_that_one_side_does_not_have_is_left_out():
    a, b = figures(2.0), figures(1.0)
    b["p99_token_itl_ms"] = None
    metrics = contrast([a], [b])["metrics"]
    assert "p99_token_itl_ms" not in metrics
    assert set(metrics) == set(METRICS) - {"p99_token_itl_ms"}


@pytest.fixture(autouse=True)
def quick_settling(monkeypatch):
    monkeypatch.setattr("slipstream.loadtest.compare.QUIET_SAMPLE_SECONDS", 0.05)
    monkeypatch.setattr("slipstream.loadtest.compare.QUIET_SECONDS", 0.1)


@pytest.fixture
def serve(serve, time_of_waiting):
    return serve


async def test_both_servers_get_the_same_prompts_in_the_order_a_b_b_a(serve, monkeypatch):
    monkeypatch.setattr("slipstream.loadtest.compare.BUSY_SHARE", 0.0)
    arrived = []
    async with serve(pace=0.002) as a, serve(pace=0.03) as b, connect(a.url) as target_a, connect(b.url) as target_b:
        for name, server in (("a", a), ("b", b)):
            server.on_request = partial(arrived.append, name)
        workload = Workload(WorkloadOptions(output_tokens=6))
        plan = Rounds(concurrencies=(1, 3), rounds=4, warmup_rounds=1, prompts_per_stream=2)
        result = await compare(target_a, target_b, workload, plan)
    # A warm-up round, then four counted ones, of 2 requests per server and then of 6.
    order = ["b", "a", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert arrived == [name for name in order for _ in range(2)] + [name for name in order for _ in range(6)]
    prompts = [[body["messages"][0]["content"] for body in server.bodies[1:]] for server in (a, b)]  # after the probe
    assert len(prompts[0]) == 5 * 2 + 5 * 6
    assert sorted(prompts[0]) == sorted(prompts[1])
    assert len(set(prompts[0])) == len(prompts[0])
    assert [part["concurrency"] for part in result["results"]] == [1, 3]
    for part in result["results"]:
        assert part["completed_a"] == part["completed_b"] == 8 * part["concurrency"]
        assert part["total_output_tokens_a"] == 6 * 8 * part["concurrency"]
        itl = part["metrics"]["mean_itl_ms"]
        assert len(itl["ratios"]) == 4
        assert itl["ratio_max"] < 0.8
        assert part["metrics"]["output_throughput"]["ratio_min"] > 1.25
    console = Console(record=True, width=120)
    print_comparison(result, console)
    text = console.export_text()
    assert "3 streams" in text
    # Here the load generator and both servers are one process, so "the other one" was anything but idle.
    assert result["idle_cpu_share"]["a"] > 0
    assert "A used up to" in text and "B used up to" in text


async def test_the_other_server_is_frozen(serve, monkeypatch):
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    stopped = []
    async with serve() as a, serve() as b, connect(a.url) as target_a, connect(b.url) as target_b:
        with subprocess.Popen(sleeping) as first, subprocess.Popen(sleeping) as second:
            processes = {a.url: psutil.Process(first.pid), b.url: psutil.Process(second.pid)}
            monkeypatch.setattr("slipstream.loadtest.compare.serving", lambda url: ProcessTree(processes[url].pid))

            def look(url):
                states = [process.status() == psutil.STATUS_STOPPED for process in processes.values()]
                stopped.append(states if url == b.url else states[::-1])

            for server in (a, b):
                server.on_request = partial(look, server.url)
            plan = Rounds(concurrencies=(1,), rounds=2, freeze=True)
            await compare(target_a, target_b, Workload(WorkloadOptions(output_tokens=4)), plan)
            assert stopped == [[True, False]] * 12
            assert all(process.status() != psutil.STATUS_STOPPED for process in processes.values())
            first.kill(), second.kill()


async def test_only_servers_of_this_machine_are_frozen(serve, monkeypatch):
    monkeypatch.setattr("slipstream.loadtest.compare.serving", lambda url: None)
    async with serve() as a, serve() as b, connect(a.url) as target_a, connect(b.url) as target_b:
        with pytest.raises(ClientError, match="frozen"):
            await compare(target_a, target_b, Workload(WorkloadOptions()), Rounds(freeze=True))


async def test_chunks_are_counted_on_both_sides_or_on_none(serve):
    async with serve() as a, serve(chunk_usage=False) as b, connect(a.url) as target_a, connect(b.url) as target_b:
        plan = Rounds(concurrencies=(1,), rounds=1, warmup_rounds=0, prompts_per_stream=1)
        result = await compare(target_a, target_b, Workload(WorkloadOptions(output_tokens=4)), plan)
        assert a.bodies[-1]["stream_options"] == {"include_usage": True}
    assert result["chunk_usage"] is False


async def test_a_server_with_other_work_is_not_compared(serve, monkeypatch):
    monkeypatch.setattr("slipstream.loadtest.compare.SETTLE_SECONDS", 0.2)
    async with serve() as a, serve(leak=1) as b, connect(a.url) as target_a, connect(b.url) as target_b:
        with pytest.raises(ClientError, match=b.url):
            await compare(target_a, target_b, Workload(WorkloadOptions()), Rounds())


@pytest.mark.parametrize(
    "options", [{"concurrencies": ()}, {"concurrencies": (0,)}, {"rounds": 0}, {"warmup_rounds": -1}]
)
def test_impossible_plans_are_refused(options):
    with pytest.raises(ValueError):
        Rounds(**options)
