"""Two servers side by side: rounds in the order A B B A, the same prompts for both, new prompts every round."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from slipstream.clients.errors import ClientError
from slipstream.loadtest.arrivals import ClosedLoop
from slipstream.loadtest.harness import Target, measure
from slipstream.loadtest.processes import ProcessTree, serving
from slipstream.loadtest.progress import progress_bar
from slipstream.loadtest.report import summarise
from slipstream.loadtest.scrape import wait_idle
from slipstream.loadtest.workloads import Request, Workload

METRICS = (
    "output_throughput",
    "total_token_throughput",
    "request_throughput",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "mean_itl_ms",
    "p99_itl_ms",
    "mean_token_itl_ms",
    "p99_token_itl_ms",
    "mean_e2el_ms",
    "p99_e2el_ms",
)
SETTLE_SECONDS = 60.0
QUIET_SECONDS = 10.0
QUIET_SAMPLE_SECONDS = 0.5
BUSY_SHARE = 0.05
"""A server that uses more than this share of a core in the other one's round disturbs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    concurrencies: tuple[int, ...] = (1, 8, 32)
    rounds: int = 4
    warmup_rounds: int = 1
    prompts_per_stream: int = 2
    freeze: bool = False
    """Each server stands still while it is the other one's turn: for those that also work without requests."""

    def __post_init__(self) -> None:
        if not self.concurrencies or min(self.concurrencies) < 1:
            raise ValueError("concurrency must be one or more numbers of at least 1")
        if self.rounds < 1 or self.warmup_rounds < 0 or self.prompts_per_stream < 1:
            raise ValueError("rounds and prompts per stream must be at least 1, warm-up rounds at least 0")


@dataclass(slots=True)
class Side:
    name: str
    target: Target
    processes: ProcessTree | None
    idle_cpu_share: float = 0.0
    """The most of one core it used in a counted round of the other side."""


async def compare(a: Target, b: Target, workload: Workload, plan: Rounds) -> dict[str, Any]:
    """Per concurrency and metric: the medians of A and B over the rounds, and the median and range of A/B."""
    chunk_usage = a.chunk_usage and b.chunk_usage
    sides = [
        Side(name, replace(target, chunk_usage=chunk_usage), serving(target.client.base_url))
        for name, target in (("a", a), ("b", b))
    ]
    if plan.freeze and not all(side.processes for side in sides):
        raise ClientError("only servers on this machine, of the same user, can be frozen")
    results = []
    for concurrency in plan.concurrencies:
        figures: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
        for number in range(-plan.warmup_rounds, plan.rounds):
            requests = await workload.round(plan.prompts_per_stream * concurrency)
            for side in sides if number % 2 == 0 else reversed(sides):
                title = f"{concurrency} streams, {f'round {number + 1}' if number >= 0 else 'warm-up'}, {side.name}"
                other = sides[1] if side is sides[0] else sides[0]
                result, idle_share = await _round(side, other, requests, concurrency, title, plan.freeze)
                if number >= 0:
                    figures[side.name].append(result)
                    other.idle_cpu_share = max(other.idle_cpu_share, idle_share)
        results.append({"concurrency": concurrency, **contrast(figures["a"], figures["b"])})
    return {
        "order": "ABBA",
        "rounds": plan.rounds,
        "prompts_per_round": {str(c): c * plan.prompts_per_stream for c in plan.concurrencies},
        "chunk_usage": chunk_usage,
        "idle_cpu_share": {side.name: round(side.idle_cpu_share, 4) if side.processes else None for side in sides},
        "results": results,
    }


async def _round(
    side: Side, other: Side, requests: Sequence[Request], concurrency: int, title: str, freeze: bool
) -> tuple[dict[str, Any], float]:
    """The figures of one side, and the share of a core that the other one used meanwhile."""
    for each in (side, other):
        load = await wait_idle(each.target.client, SETTLE_SECONDS)
        if load is not None and not load.idle:
            raise ClientError(
                f"{each.target.client.base_url} still works on other requests ({load.running:g} running, "
                f"{load.waiting:g} waiting): a comparison needs both servers for itself"
            )
    with ExitStack() as stack:
        if freeze and other.processes:
            stack.enter_context(other.processes.frozen())
        else:
            await _quiet(other.processes)
        before = other.processes.cpu_seconds() if other.processes else 0.0
        on_end = stack.enter_context(progress_bar(title, len(requests)))
        run = await measure(side.target, requests, ClosedLoop(concurrency), on_end)
        used = other.processes.cpu_seconds() - before if other.processes else 0.0
    return summarise(run), used / run.duration


async def _quiet(processes: ProcessTree | None) -> None:
    """Wait until the processes rest: threads of a server without requests may spin on for a while."""
    start = perf_counter()
    while processes is not None and perf_counter() - start < QUIET_SECONDS:
        before = processes.cpu_seconds()
        await asyncio.sleep(QUIET_SAMPLE_SECONDS)
        if processes.cpu_seconds() - before < BUSY_SHARE * QUIET_SAMPLE_SECONDS:
            return


def contrast(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the figures of equal rounds: ``a[i]`` and ``b[i]`` answered the same prompts."""
    metrics = {}
    for name in METRICS:
        pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) if x[name] and y[name]]
        if not pairs:
            continue
        ratios = [x / y for x, y in pairs]
        metrics[name] = {
            "a": round(median(x for x, _ in pairs), 4),
            "b": round(median(y for _, y in pairs), 4),
            "ratio": round(median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "ratio_max": round(max(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
        }
    sums = {
        f"{field}_{name}": sum(figures[field] for figures in side)
        for field in ("completed", "failed", "total_output_tokens")
        for name, side in (("a", a), ("b", b))
    }
    errors = {name: [e for figures in side for e in figures["errors"]] for name, side in (("a", a), ("b", b))}
    counts = {f"token_counts_{name}": side[0]["token_counts"] for name, side in (("a", a), ("b", b))}
    return {**sums, **counts, "errors": errors, "metrics": metrics}


def print_comparison(result: dict[str, Any], console: Console) -> None:
    for part in result["results"]:
        table = Table("metric", "A", "B", "A/B", "range", title=f"{part['concurrency']} streams", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, row in part["metrics"].items():
            spread = f"{row['ratio_min']:.3f} – {row['ratio_max']:.3f}"
            table.add_row(name, f"{row['a']:.2f}", f"{row['b']:.2f}", f"{row['ratio']:.3f}", spread)
        console.print(table)
        for name in ("a", "b"):
            if part[f"token_counts_{name}"] == "chunks":
                console.print(f"{name.upper()} reports no usage: one token per chunk is assumed.")
            if part[f"failed_{name}"]:
                console.print(f"{name.upper()}: {part[f'failed_{name}']} failed, e.g. {part['errors'][name][0]}")
    for name, share in result["idle_cpu_share"].items():
        if share is not None and share > BUSY_SHARE:
            console.print(
                f"[yellow]{name.upper()} used up to {share:.0%} of a core while the other one was measured.[/yellow]"
            )
