"""/metrics against what was really asked."""

from __future__ import annotations

import time
from typing import Any

import pytest
from prometheus_client.core import CounterMetricFamily

from slipstream.engine.messages import EngineStats
from slipstream.engine.totals import added
from slipstream.server.telemetry.metrics import FROM_STATS, Metrics

NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "kv_blocks_total",
    "kv_blocks_used",
    "kv_blocks_cached",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_num_preemptions",
    "request_prefill_kv_computed_tokens",
    "iteration_tokens_total",
    "cache_config_info",
    "request_success_total",
    "engine_steps_total",
    "step_seconds_total",
    "scheduler_cpu_seconds_total",
    "ready",
}


def test_every_name_is_there(server: Any) -> None:
    server.complete("Hello", max_tokens=3)
    lines = server.get("/metrics")[1].splitlines()
    found = {line.split(" ")[2] for line in lines if line.startswith("# TYPE slipstream:")}
    assert {f"slipstream:{name}" for name in NAMES} <= found


def test_counts_of_one_request(server: Any) -> None:
    server.wait_until_idle()
    counted = [
        "generation_tokens_total",
        "prompt_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_prompt_tokens_sum",
        "request_generation_tokens_sum",
        "request_max_num_generation_tokens_sum",
        "request_params_n_sum",
        "request_params_max_tokens_sum",
        "request_queue_time_seconds_count",
        "request_prefill_time_seconds_count",
        "iteration_tokens_total_count",
    ]
    before = {name: server.metric(name) for name in counted}
    usage = server.complete([301, 302, 303, 304, 305], max_tokens=10, n=2, ignore_eos=True, cache_salt="here")["usage"]
    assert usage["completion_tokens"] == 20
    server.wait_until_idle()
    grown = {name: server.metric(name) - before[name] for name in counted}
    assert grown.pop("iteration_tokens_total_count") >= 10
    assert grown == {
        "generation_tokens_total": 20,
        "prompt_tokens_total": 10,
        "request_success_total": 2,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 18,
        "e2e_request_latency_seconds_count": 2,
        "request_prompt_tokens_sum": 10,
        "request_generation_tokens_sum": 20,
        "request_max_num_generation_tokens_sum": 10,
        "request_params_n_sum": 2,
        "request_params_max_tokens_sum": 10,
        "request_queue_time_seconds_count": 2,
        "request_prefill_time_seconds_count": 2,
    }


def test_times_fit_together(server: Any) -> None:
    server.wait_until_idle()
    names = ("e2e_request_latency", "request_queue_time", "request_inference_time", "time_to_first_token")
    before = {name: server.metric(f"{name}_seconds_sum") for name in names}
    started = time.monotonic()
    server.complete("Hello", max_tokens=30, ignore_eos=True)
    took = time.monotonic() - started
    total, queued, inference, first = (server.metric(f"{name}_seconds_sum") - before[name] for name in names)
    assert 0 < queued < first < queued + inference <= total + 1e-6 and total < took


def test_time_of_steps(server: Any) -> None:
    server.wait_until_idle()
    names = ("engine_steps_total", "step_seconds_total", "scheduler_cpu_seconds_total")
    before = {name: server.metric(name) for name in names}
    started = time.monotonic()
    server.complete("Hello", max_tokens=30, ignore_eos=True, speculation={"mode": "off"})
    server.wait_until_idle()
    took = time.monotonic() - started
    steps, model, overhead = (server.metric(name) - before[name] for name in names)
    assert steps >= 30
    assert overhead > 0  # processor time: on a busy machine a tiny model takes no longer
    assert 0 < model < took


def test_responses_are_counted_by_route_and_status(server: Any) -> None:
    before = server.metric("http_responses_total", route="/v1/completions", status="400")
    server.post("/v1/completions", {"prompt": "x", "temperature": 9})
    assert server.metric("http_responses_total", route="/v1/completions", status="400") == before + 1
    other = server.metric("http_responses_total", route="other", status="404")
    server.get("/a/path/somebody/made/up")
    assert server.metric("http_responses_total", route="other", status="404") == other + 1


def test_failures_are_counted_from_nought() -> None:
    metrics = Metrics("m")
    metrics.expect_failures("/v1/completions")
    lines = metrics.render()[0].decode().splitlines()
    for series in (
        *(f'request_success_total{{finished_reason="{reason}",model_name="m"}}' for reason in ("stop", "error")),
        'admission_rejections_total{model_name="m",reason="queue_full"}',
        *(f'http_responses_total{{route="/v1/completions",status="{status}"}}' for status in (429, 500, 503, 504)),
        "connections_cut_total",
        "engine_restarts_total",
        'engine_stalled_seconds{model_name="m"}',
    ):
        assert f"slipstream:{series} 0.0" in lines


@pytest.mark.parametrize(("name", "read"), [each[1::2] for each in FROM_STATS if each[0] is CounterMetricFamily])
def test_counters_go_on_over_a_restart_of_the_engine(name: str, read: Any) -> None:
    stats = EngineStats(
        **{field: 7 for field in EngineStats.__struct_fields__ if type(getattr(EngineStats(), field)) in (int, float)}
    )
    assert read(added(stats, stats)) == 2 * read(stats) > 0, name
