"""From records to figures: a table for people, one JSON line for programs.

Keys are those of ``vllm bench serve`` where it has them; docs/benchmarks.md defines every figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slipstream.loadtest.harness import Run
from slipstream.loadtest.record import RequestRecord
from slipstream.loadtest.scrape import Speculation, Steps

LATENCIES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL per chunk",
    "token_itl": "ITL per token",
    "e2el": "end to end",
}
STATISTICS = ("mean", "median", "std", "p90", "p95", "p99")


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Statistics of latencies, in milliseconds; None without values. Percentiles interpolate linearly."""
    if not seconds:
        return dict.fromkeys(STATISTICS)
    values = np.asarray(seconds) * 1e3
    median, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99))
    figures = (values.mean(), median, values.std(), p90, p95, p99)
    return {name: round(float(figure), 4) for name, figure in zip(STATISTICS, figures, strict=True)}


def summarise(run: Run) -> dict[str, Any]:
    """Figures of a run; latencies are of completed requests only."""
    done = [record for record in run.records if record.ok]
    failed = [record for record in run.records if not record.ok]
    prompt_tokens = sum(record.prompt_tokens or 0 for record in done)
    output_tokens = sum(record.output_tokens for record in done)
    token_itls = [record.token_itl() for record in done]
    latencies = {
        "ttft": [ttft for record in done if (ttft := record.ttft()) is not None],
        "tpot": [tpot for record in done if (tpot := record.tpot()) is not None],
        "itl": [gap for record in done for gap in record.itl()],
        "token_itl": [gap for gaps in token_itls for gap in gaps or ()],
        "e2el": [record.e2el() for record in done],
    }
    counted = all(record.completion_tokens is not None for record in done)
    figures: dict[str, Any] = {
        "duration": round(run.duration, 4),
        "completed": len(done),
        "failed": len(failed),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": _rate(len(done), run.duration),
        "output_throughput": _rate(output_tokens, run.duration),
        "total_token_throughput": _rate(prompt_tokens + output_tokens, run.duration) if counted else None,
        "max_concurrent_requests": max_concurrent(run.records),
        "max_send_lag_ms": round(max((record.start - record.due for record in run.records), default=0) * 1e3, 3),
        "mean_tokens_per_chunk": _rate(output_tokens, sum(len(record.chunk_times) for record in done)),
        "token_counts": "usage" if counted else "chunks",
        "token_itl_known": sum(gaps is not None for gaps in token_itls),
    }
    for name, values in latencies.items():
        figures |= {f"{statistic}_{name}_ms": value for statistic, value in spread(values).items()}
    figures["finish_reasons"] = dict(Counter(record.finish_reasons[0] for record in done))
    figures["errors"] = dict(Counter(record.error for record in failed).most_common(10))
    return figures


def summarise_steps(steps: Steps) -> dict[str, Any]:
    """Figures of the engine's own counters over a run."""
    return {
        "engine_steps": round(steps.count),
        "mean_step_ms": _rate(steps.model_seconds * 1e3, steps.count),
        "scheduler_cpu_ms_per_step": _rate(steps.overhead_cpu_seconds * 1e3, steps.count),
    }


def summarise_speculation(counts: Speculation) -> dict[str, Any]:
    """Figures of draft tokens over a run; the acceptance length counts the token that the step brings anyway."""
    return {
        "spec_decode_num_drafts": round(counts.drafts),
        "spec_decode_acceptance_length": round(1 + counts.accepted_tokens / counts.drafts, 4) if counts.drafts else 1.0,
        "spec_decode_acceptance_rate": _rate(counts.accepted_tokens, counts.draft_tokens),
    }


def _rate(amount: float, divisor: float) -> float:
    return round(amount / divisor, 4) if divisor else 0.0


def max_concurrent(records: Iterable[RequestRecord]) -> int:
    """The most requests under way at one time; one that ends as another starts does not overlap it."""
    changes = sorted([(record.start, 1) for record in records] + [(record.end, -1) for record in records])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def print_summary(title: str, figures: dict[str, Any], console: Console) -> None:
    console.print(title, markup=False, highlight=False)
    totals = Table(show_header=False)
    totals.add_row("completed / failed", f"{figures['completed']} / {figures['failed']}")
    totals.add_row("duration", f"{figures['duration']:.2f} s")
    totals.add_row("input / output tokens", f"{figures['total_input_tokens']} / {figures['total_output_tokens']}")
    totals.add_row("requests per second", f"{figures['request_throughput']:.3f}")
    totals.add_row("output tokens per second", f"{figures['output_throughput']:.1f}")
    if figures["total_token_throughput"] is not None:
        totals.add_row("all tokens per second", f"{figures['total_token_throughput']:.1f}")
    totals.add_row("most requests at once", str(figures["max_concurrent_requests"]))
    totals.add_row("tokens per chunk", f"{figures['mean_tokens_per_chunk']:.2f}")
    if "engine_steps" in figures:
        totals.add_row("engine steps", str(figures["engine_steps"]))
        totals.add_row("mean step in the model", f"{figures['mean_step_ms']:.2f} ms")
        totals.add_row("scheduler CPU per step", f"{figures['scheduler_cpu_ms_per_step']:.3f} ms")
    if figures.get("spec_decode_num_drafts"):
        totals.add_row("tokens per step with draft tokens", f"{figures['spec_decode_acceptance_length']:.2f}")
        totals.add_row("accepted draft tokens", f"{figures['spec_decode_acceptance_rate']:.1%}")
    console.print(totals)
    latencies = Table("milliseconds", *("p50" if name == "median" else name for name in STATISTICS))
    for name, title in LATENCIES.items():
        values = [figures[f"{statistic}_{name}_ms"] for statistic in STATISTICS]
        latencies.add_row(title, *("–" if value is None else f"{value:.2f}" for value in values))
    console.print(latencies)
    if figures["completed"] > figures["token_itl_known"]:
        unknown = figures["completed"] - figures["token_itl_known"]
        console.print(f"Per-token latency leaves out {unknown} requests whose chunks do not tell their tokens.")
    if figures["token_counts"] == "chunks":
        console.print("The server reports no usage: prompt tokens are unknown, and one token per chunk is assumed.")
    for error, count in figures["errors"].items():
        console.print(f"[red]{count} failed:[/red] {escape(error)}", highlight=False)


def print_json(result: dict[str, Any]) -> None:
    """The result as one line on stdout, to be the last one."""
    print(msgspec.json.encode(result).decode(), flush=True)
