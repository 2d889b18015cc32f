"""Many random requests, a share of which we break off; afterwards nothing may be left over."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from slipstream.clients.errors import ClientError
from slipstream.loadtest.arrivals import ClosedLoop, drive
from slipstream.loadtest.harness import Target, receive
from slipstream.loadtest.processes import ProcessTree
from slipstream.loadtest.progress import progress_bar
from slipstream.loadtest.record import RequestRecord
from slipstream.loadtest.scrape import read_load, wait_idle
from slipstream.loadtest.workloads import CHAT, Request, Workload, WorkloadOptions

SAMPLE_SECONDS = 0.5
MIN_SAMPLES = 8
FULL = 0.98
"""Share of the KV cache that holds something once it is full: blocks that no hash names are free again at once."""
FLAT_GROWTH = 0.02
"""Memory is flat when the line fitted to the second half rises by less than this share of its mean."""
MIB = 1024 * 1024
MemorySample = tuple[float, dict[str, int]]
"""Seconds, and bytes by process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakOptions:
    requests: int = 2000
    concurrency: int = 64
    abort_share: float = 0.3
    max_output_tokens: int = 128
    settle: float = 30.0
    pid: int | None = None
    seed: int = 0
    dataset: Path | None = None

    def __post_init__(self) -> None:
        if self.pid is not None and not psutil.pid_exists(self.pid):
            raise ValueError(f"there is no process {self.pid}")


@dataclass(frozen=True, slots=True)
class Trial:
    """One request and when we break it off: after so many token chunks, after so many seconds, or never."""

    request: Request
    chunks: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class Outcomes:
    """Every trial ends in exactly one of the four counts."""

    finished: int = 0
    cut_before_first_token: int = 0
    cut_mid_stream: int = 0
    failed: int = 0
    output_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)


async def plan_trials(options: SoakOptions, workload: Workload) -> list[Trial]:
    """Chat questions, one in eight behind a long text; breaks are by chunks, before the first token, by deadline."""
    random = Random(f"soak {options.seed}")
    trials = []
    for request in await workload.round(options.requests):
        (message,) = request.body["messages"]
        if random.random() < 1 / 8:
            text = await workload.text(random.randint(200, 1500))
            message = {"role": "user", "content": f"{text}\n\n{message['content']}"}
        max_tokens = random.randint(1, options.max_output_tokens)
        body = {"messages": [message], "max_tokens": max_tokens, "temperature": random.choice((0.0, 0.8))}
        chunks = seconds = None
        if random.random() < options.abort_share:
            match random.choice(("chunks", "early", "deadline")):
                case "chunks":
                    chunks = random.randint(1, max_tokens)
                case "early":
                    chunks, seconds = 1, random.uniform(0, 0.05)
                case "deadline":
                    seconds = random.uniform(0.05, 5)
        trials.append(Trial(Request(CHAT, body), chunks, seconds))
    return trials


async def run_trial(target: Target, trial: Trial, outcomes: Outcomes) -> bool:
    """True unless the request failed."""
    now = perf_counter()
    record = RequestRecord(due=now, start=now)
    cut = True
    try:
        async with asyncio.timeout(trial.seconds):
            cut = await receive(target, trial.request, record, max_chunks=trial.chunks)
    except TimeoutError:
        pass
    outcomes.output_tokens += record.output_tokens
    if record.error is not None:
        outcomes.failed += 1
        outcomes.errors[record.error] += 1
    elif not cut:
        outcomes.finished += 1
        outcomes.finish_reasons.update(record.finish_reasons)
    elif record.chunk_times:
        outcomes.cut_mid_stream += 1
    else:
        outcomes.cut_before_first_token += 1
    return record.ok


async def soak(target: Target, options: SoakOptions) -> dict[str, Any]:
    """The figures; ``problems`` lists in words what did not hold."""
    before = await read_load(target.client)
    if before is None:
        raise ClientError(f"{target.client.base_url}/metrics has no running, waiting and KV-cache gauges to check")
    if not before.idle:
        raise ClientError(f"{target.client.base_url} is busy before the soak starts: {before}")
    workload = Workload(WorkloadOptions(seed=options.seed, dataset=options.dataset))
    trials = await plan_trials(options, workload)
    outcomes = Outcomes()
    start = perf_counter()
    async with memory_samples(options.pid) as samples:
        with progress_bar("soak", len(trials)) as on_end:

            async def send(trial: Trial, due: float) -> None:
                on_end(await run_trial(target, trial, outcomes))

            await drive(trials, ClosedLoop(options.concurrency), send)
        duration = perf_counter() - start
        after = await wait_idle(target.client, options.settle)
        settled = perf_counter() - start - duration
    assert after is not None
    check = RequestRecord(due=start, start=perf_counter())
    await receive(target, trials[0].request, check)
    memory = memory_trend(samples)
    problems = [f"{count} requests failed: {error}" for error, count in outcomes.errors.items()]
    if outcomes.finished + outcomes.cut_before_first_token + outcomes.cut_mid_stream + outcomes.failed != len(trials):
        problems.append("some requests have no outcome")
    if not after.idle:
        problems.append(f"not idle after {options.settle:g} s: {after}")
    if check.error:
        problems.append(f"a request after the soak failed: {check.error}")
    filled = before.kv_cache_filled, after.kv_cache_filled
    if memory is not None and (problem := memory_problem(memory, filled)) is not None:
        problems.append(problem)
    return {
        "requests": len(trials),
        "concurrency": options.concurrency,
        "duration": round(duration, 3),
        "finished": outcomes.finished,
        "cut_before_first_token": outcomes.cut_before_first_token,
        "cut_mid_stream": outcomes.cut_mid_stream,
        "failed": outcomes.failed,
        "finish_reasons": dict(outcomes.finish_reasons),
        "output_throughput": round(outcomes.output_tokens / duration, 3),
        "preemptions": after.preemptions - before.preemptions,
        "seconds_until_idle": round(settled, 3),
        "running_after": after.running,
        "waiting_after": after.waiting,
        "kv_cache_usage_after": after.kv_cache_usage,
        "kv_cache_filled": filled,
        "memory": memory,
        "problems": problems,
    }


@asynccontextmanager
async def memory_samples(pid: int | None) -> AsyncIterator[list[MemorySample]]:
    """Fills the list while the block runs; leaves it empty without a process."""
    samples: list[MemorySample] = []

    async def sample(tree: ProcessTree) -> None:
        while True:
            samples.append((perf_counter(), tree.resident_bytes()))
            await asyncio.sleep(SAMPLE_SECONDS)

    if pid is None:
        yield samples
        return
    sampler = asyncio.create_task(sample(ProcessTree(pid)))
    try:
        yield samples
    finally:
        sampler.cancel()


def memory_trend(samples: list[MemorySample]) -> dict[str, Any] | None:
    """A line through the second half of the samples; None if there are too few to say anything."""
    if len(samples) < MIN_SAMPLES:
        return None
    totals = np.asarray([sum(sizes.values()) for _, sizes in samples]) / MIB
    half = samples[len(samples) // 2 :]
    times, sizes = np.asarray([at for at, _ in half]), totals[len(samples) // 2 :]
    slope = float(np.polyfit(times - times[0], sizes, 1)[0])
    growth = slope * float(times[-1] - times[0])
    first, last = half[0][1], half[-1][1]
    return {
        "samples": len(samples),
        "first_mib": round(float(totals[0]), 1),
        "last_mib": round(float(totals[-1]), 1),
        "max_mib": round(float(totals.max()), 1),
        "growth_mib": round(growth, 2),
        "growth_mib_per_minute": round(slope * 60, 2),
        "by_process": {
            name: [round(each.get(name, 0) / MIB, 1) for each in (first, last)] for name in sorted({*first, *last})
        },
        "flat": bool(growth < FLAT_GROWTH * sizes.mean()),
    }


def memory_problem(memory: dict[str, Any], filled: Sequence[float | None]) -> str | None:
    """What is wrong with a trend, in words; ``filled`` is how full the KV cache was before and after."""
    if memory["flat"]:
        return None
    problem = f"memory grew by {memory['growth_mib']} MiB in the second half"
    before, after = filled
    if before is None or after is None or before > FULL:
        return problem
    return f"{problem}; part of it is the KV cache, {before:.0%} of which was in use or kept before, {after:.0%} after"


def by_process(memory: dict[str, Any]) -> list[str]:
    """A line about each process of a trend."""
    sizes = memory["by_process"].items()
    return [f"{name}: {first:.0f} → {last:.0f} MiB in the second half" for name, (first, last) in sizes]


def print_soak(result: dict[str, Any], console: Console) -> None:
    table = Table(title="soak", show_header=False, title_justify="left")
    table.add_row("requests", f"{result['requests']} at {result['concurrency']} concurrent")
    table.add_row("finished", f"{result['finished']} {result['finish_reasons']}")
    table.add_row("broken off before the first token", str(result["cut_before_first_token"]))
    table.add_row("broken off in mid-stream", str(result["cut_mid_stream"]))
    table.add_row("failed", str(result["failed"]))
    table.add_row("duration", f"{result['duration']:.1f} s, {result['output_throughput']:.1f} output tokens/s")
    table.add_row("preemptions", f"{result['preemptions']:g}")
    left = f"running {result['running_after']:g}, waiting {result['waiting_after']:g}"
    table.add_row("left over", f"{left}, KV cache {result['kv_cache_usage_after']:.2%}")
    table.add_row("seconds until idle", f"{result['seconds_until_idle']:.2f}")
    if memory := result["memory"]:
        sizes = f"{memory['first_mib']:.0f} → {memory['last_mib']:.0f} MiB, at most {memory['max_mib']:.0f}"
        trend = f"second half {memory['growth_mib']:+.1f} MiB, {'flat' if memory['flat'] else 'NOT flat'}"
        table.add_row("memory", f"{sizes}; {trend}")
        for said in by_process(memory):
            table.add_row("", said)
    console.print(table)
    for problem in result["problems"]:
        console.print(f"problem: {problem}", style="red", markup=False, highlight=False)
