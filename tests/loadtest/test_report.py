import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from slipstream.clients.sse import Chunk
from slipstream.loadtest.harness import Run
from slipstream.loadtest.record import RequestRecord
from slipstream.loadtest.report import (
    STATISTICS,
    max_concurrent,
    print_summary,
    spread,
    summarise,
    summarise_speculation,
    summarise_steps,
)
from slipstream.loadtest.scrape import Speculation, Steps

latencies = st.lists(st.floats(0.001, 100), min_size=1, max_size=200)


@given(latencies)
def test_spread_agrees_with_the_standard_library(values):
    figures = spread(values)
    scaled = [value * 1e3 for value in values]
    assert figures["mean"] == pytest.approx(statistics.fmean(scaled), abs=1e-4)
    assert figures["median"] == pytest.approx(statistics.median(scaled), abs=1e-4)
    assert figures["std"] == pytest.approx(statistics.pstdev(scaled), abs=1e-3)
    if len(values) > 1:
        cuts = statistics.quantiles(scaled, n=100, method="inclusive")
        assert figures["p90"] == pytest.approx(cuts[89], abs=1e-4)
        assert figures["p99"] == pytest.approx(cuts[98], abs=1e-4)


@given(latencies)
def test_percentiles_rise_and_stay_within_the_values(values):
    figures = spread(values)
    ordered = [figures[name] for name in ("median", "p90", "p95", "p99")]
    assert ordered == sorted(ordered)
    assert min(values) * 1e3 - 1e-3 <= ordered[0] and ordered[-1] <= max(values) * 1e3 + 1e-3


def test_no_values_give_no_figures():
    assert spread([]) == dict.fromkeys(STATISTICS)


intervals = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=30)


@given(intervals)
def test_most_requests_at_once(spans):
    records = [RequestRecord(due=start, start=start, end=start + length) for start, length in spans]
    brute = max((sum(a.start <= time < a.end for a in records) for time in range(71)), default=0)
    assert max_concurrent(records) == brute


def finished(start: float, times: list[float]) -> RequestRecord:
    record = RequestRecord(due=start - 0.5, start=start)
    for count, time in enumerate(times, 1):
        usage = {"prompt_tokens": 10, "completion_tokens": count}
        record.add(Chunk(time, {"choices": [{"text": "x"}], "usage": usage}))
    record.add(Chunk(times[-1], {"choices": [{"text": "", "finish_reason": "length"}]}))
    return record


def test_summary_of_a_run_worked_out_by_hand():
    broken = RequestRecord(due=0, start=0, end=9.0, chunk_times=[1.0], chunk_tokens=[1], error="[boom]")
    run = Run([finished(0.0, [1.0, 2.0, 4.0]), finished(1.0, [2.0, 3.0]), broken], duration=5.0)
    figures = summarise(run)
    expected = {
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 20,
        "total_output_tokens": 5,
        "request_throughput": 0.4,
        "output_throughput": 1.0,
        "total_token_throughput": 5.0,
        "max_concurrent_requests": 3,
        "max_send_lag_ms": 500.0,
        "mean_tokens_per_chunk": 1.0,
        "mean_ttft_ms": 1000.0,
        "mean_tpot_ms": 1250.0,
        "mean_itl_ms": 1333.3333,
        "mean_token_itl_ms": 1333.3333,
        "mean_e2el_ms": 3000.0,
        "median_e2el_ms": 3000.0,
        "finish_reasons": {"length": 2},
        "errors": {"[boom]": 1},
    }
    assert {name: figures[name] for name in expected} == expected
    console = Console(record=True, width=120)
    print_summary("a run", figures, console)
    text = console.export_text()
    assert "2 / 1" in text and "1250.00" in text and "[boom]" in text


def test_steps_of_the_engine_are_part_of_the_summary():
    figures = summarise(Run([finished(0.0, [1.0, 2.0])], duration=5.0)) | summarise_steps(Steps(200, 3.0, 0.05))
    assert figures["mean_step_ms"] == 15.0
    assert figures["scheduler_cpu_ms_per_step"] == 0.25
    console = Console(record=True, width=120)
    print_summary("a run", figures, console)
    assert "0.250 ms" in console.export_text()


def test_drafts_are_part_of_the_summary():
    figures = summarise(Run([finished(0.0, [1.0, 2.0])], duration=5.0))
    figures |= summarise_speculation(Speculation(10, 40, 30))
    assert figures["spec_decode_acceptance_length"] == 4.0
    assert figures["spec_decode_acceptance_rate"] == 0.75
    assert summarise_speculation(Speculation(0, 0, 0))["spec_decode_acceptance_length"] == 1.0
    console = Console(record=True, width=120)
    print_summary("a run", figures, console)
    assert "75.0%" in console.export_text()


def test_a_run_of_failures_only_has_a_summary():
    figures = summarise(Run([RequestRecord(due=0, start=0, end=1, error="refused")], duration=1.0))
    assert (figures["completed"], figures["failed"], figures["mean_ttft_ms"]) == (0, 1, None)
    print_summary("failures", figures, Console(record=True))
