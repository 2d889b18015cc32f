"""Three tenants of which one floods: does the server stay fast, and the quiet ones unharmed?

First it is found out what the server can do at most, then what the quiet tenants see when they are alone, then all come
at once, together with more than the server can do; some clients read slowly, and some go away.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from slipstream.clients.errors import APIError, ClientError
from slipstream.loadtest.arrivals import ClosedLoop, OpenLoop, drive
from slipstream.loadtest.harness import Target
from slipstream.loadtest.progress import progress_bar
from slipstream.loadtest.record import RequestRecord
from slipstream.loadtest.scrape import read_load, wait_idle
from slipstream.loadtest.soak import by_process, memory_problem, memory_samples, memory_trend
from slipstream.loadtest.workloads import CHAT, Request, Workload, WorkloadError, WorkloadOptions

BUSY = (429, 503)
"""What a server says that has no room now."""
SLOW_S = 0.3
"""Seconds between two reads of a slow client."""
PEAK_REQUESTS, MOST_REPEATS = 2048, 8
WARM_SHARE = 0.4
"""Share of the search for the peak in which the streams come to their pace; it does not count."""
AT_ONCE = 128
"""Prompts that are drawn at once."""
TICKS = 20
"""Per second: how exactly it is kept when tokens came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantsOptions:
    seconds: float = 1800.0
    alone_seconds: float = 120.0
    peak_seconds: float = 60.0
    concurrency: int = 64
    """Streams that find out what the server can do."""
    overload: float = 1.5
    """Requests that come, as a multiple of what it can do."""
    quiet_share: float = 0.05
    """What each of the quiet tenants asks for, as a share of what it can do."""
    abort_share: float = 0.1
    slow_share: float = 0.1
    max_output_tokens: int = 64
    least_goodput: float = 0.95
    most_goodput: float = 1.2
    """A server that does more than that under the flood could do more than was found, so there was no flood."""
    most_delay: float = 1.5
    settle: float = 60.0
    pid: int | None = None
    seed: int = 0
    dataset: Path | None = None

    def __post_init__(self) -> None:
        if self.pid is not None and not psutil.pid_exists(self.pid):
            raise ValueError(f"there is no process {self.pid}")
        if not 0 < 2 * self.quiet_share < self.overload:
            raise ValueError("the quiet tenants would ask for more than there is to come")


@dataclass(frozen=True, slots=True)
class Trial:
    request: Request
    chunks: int | None = None
    """After how many chunks the client goes away."""
    slow: bool = False

    @property
    def tokens(self) -> int:
        """About how many the server has to make for it."""
        most: int = self.request.body["max_tokens"]
        return most if self.chunks is None else min(self.chunks, most)


@dataclass(slots=True)
class Tally:
    """What became of the requests of one tenant."""

    sent: int = 0
    whole: int = 0
    cut: int = 0
    refused: int = 0
    refused_without_retry: int = 0
    failed: int = 0
    ticks: Counter[int] = field(default_factory=Counter)
    """Tokens by when they came."""
    first_tokens: list[float] = field(default_factory=list)
    """Seconds from when a request was due to its first token."""
    errors: list[str] = field(default_factory=list)

    def add(self, tokens: int) -> None:
        self.ticks[int(perf_counter() * TICKS)] += tokens

    def pace(self, start: float, end: float) -> float:
        """Tokens per second between the two times."""
        ticks = range(int(start * TICKS), int(end * TICKS) + 1)
        return sum(count for tick, count in self.ticks.items() if tick in ticks) * TICKS / len(ticks)

    def summary(self, span: tuple[float, float]) -> dict[str, Any]:
        p50, p99 = np.percentile(self.first_tokens, (50, 99)) if self.first_tokens else (None, None)
        counts = {name: getattr(self, name) for name in ("sent", "whole", "cut", "refused", "failed")}
        return counts | {
            "tokens_per_second": round(self.pace(*span), 2),
            "first_token_p50": None if p50 is None else round(float(p50), 4),
            "first_token_p99": None if p99 is None else round(float(p99), 4),
        }


class Prompts:
    """Questions without end: those of the data come again, in another order; no cache holds so many."""

    def __init__(self, options: TenantsOptions) -> None:
        self._options = options
        self._seed = options.seed
        self._workload = self._fresh()

    async def draw(self, count: int) -> list[Request]:
        """Raises WorkloadError for data with hardly any questions."""
        found: list[Request] = []
        while len(found) < count:
            try:
                found += await self._workload.round(AT_ONCE)
            except WorkloadError:
                self._seed += 1
                self._workload = self._fresh()
                found += await self._workload.round(AT_ONCE)
        return found[:count]

    def _fresh(self) -> Workload:
        return Workload(WorkloadOptions(seed=self._seed, dataset=self._options.dataset))


async def plan(options: TenantsOptions, prompts: Prompts, count: int, name: str) -> list[Trial]:
    random = Random(f"tenants {name} {options.seed}")
    trials = []
    for request in await prompts.draw(count):
        tokens = random.randint(options.max_output_tokens // 4 or 1, options.max_output_tokens)
        body = {"messages": request.body["messages"], "max_tokens": tokens, "temperature": 0.8, "ignore_eos": True}
        kind = random.random()
        chunks = random.randint(1, tokens) if kind < options.abort_share else None
        slow = options.abort_share <= kind < options.abort_share + options.slow_share
        trials.append(Trial(Request(CHAT, body), chunks, slow))
    return trials


async def send(target: Target, trial: Trial, due: float, tally: Tally) -> None:
    """One request; every one ends in exactly one of the counts."""
    record = RequestRecord(due=due, start=perf_counter())
    tally.sent += 1
    cut = False
    try:
        async with target.client.stream(trial.request.path, target.body(trial.request)) as stream:
            async for chunk in stream:
                before = record.output_tokens
                record.add(chunk)
                tally.add(record.output_tokens - before)
                if trial.chunks is not None and len(record.chunk_times) >= trial.chunks:
                    cut = True
                    break
                if trial.slow:
                    await asyncio.sleep(SLOW_S)
    except APIError as error:
        if error.status in BUSY and not record.chunk_times:
            tally.refused += 1
            tally.refused_without_retry += error.retry_after is None
        else:
            tally.failed += 1
            tally.errors.append(str(error))
        return
    except ClientError as error:
        tally.failed += 1
        tally.errors.append(str(error))
        return
    if record.chunk_times:
        tally.first_tokens.append(record.chunk_times[0] - due)
    if not cut and len(record.finish_reasons) != 1:
        tally.failed += 1
        tally.errors.append(f"the stream had {len(record.finish_reasons)} finish reasons instead of one")
    elif cut:
        tally.cut += 1
    else:
        tally.whole += 1


async def tenants(flood: Target, quiet: Sequence[Target], options: TenantsOptions) -> dict[str, Any]:
    """The figures; ``problems`` lists in words what did not hold."""
    before = await read_load(flood.client)
    if before is None or not before.idle:
        raise ClientError(f"{flood.client.base_url} is busy, or has no gauges of its load: {before}")
    prompts = Prompts(options)
    peak, rate = await find_peak(flood, options, prompts)
    quiet_rate = options.quiet_share * rate
    async with AsyncExitStack() as stack:
        samples = await stack.enter_async_context(memory_samples(options.pid))
        calm = [(target, quiet_rate) for target in quiet]
        alone, alone_span = await phase("alone", options.alone_seconds, calm, options, prompts)
        began = len(samples)
        loaded = await read_load(flood.client)
        flood_rate = options.overload * rate - len(quiet) * quiet_rate
        together, span = await phase("together", options.seconds, [(flood, flood_rate), *calm], options, prompts)
        after = await wait_idle(flood.client, options.settle)
    assert after is not None and loaded is not None
    memory = memory_trend(samples[began:])
    goodput = sum(tally.pace(*span) for tally in together)
    found: dict[str, Any] = {
        "peak_tokens_per_second": round(peak, 2),
        "peak_requests_per_second": round(rate, 3),
        "goodput": round(goodput / peak, 4),
        "flood": together[0].summary(span),
        "quiet": [tally.summary(span) for tally in together[1:]],
        "quiet_alone": [tally.summary(alone_span) for tally in alone],
        "running_after": after.running,
        "waiting_after": after.waiting,
        "kv_cache_usage_after": after.kv_cache_usage,
        "kv_cache_filled": (loaded.kv_cache_filled, after.kv_cache_filled),
        "refused_without_retry_after": sum(tally.refused_without_retry for tally in [*alone, *together]),
        "memory": memory,
        "options": asdict(options) | {"dataset": options.dataset and options.dataset.name},
    }
    found["problems"] = problems_of(found, [*alone, *together], options)
    if not after.idle:
        found["problems"].append(f"not idle after {options.settle:g} s: {after}")
    return found


async def find_peak(target: Target, options: TenantsOptions, prompts: Prompts) -> tuple[float, float]:
    """Tokens per second of a server that always has enough to do, and as many requests of the flood as make so many."""
    tally = Tally()
    trials = await plan(replace(options, slow_share=0.0), prompts, PEAK_REQUESTS, "peak")
    start = perf_counter()
    end = start + options.peak_seconds
    with progress_bar("peak", MOST_REPEATS * len(trials)) as on_end:

        async def one(trial: Trial, due: float) -> None:
            if perf_counter() < end:
                await send(target, trial, due, tally)
                on_end(True)

        await drive(MOST_REPEATS * trials, ClosedLoop(options.concurrency), one)
    if not tally.whole:
        raise ClientError(f"no request was answered: {tally.errors[:1]}")
    # On a machine that had no time for either side then, what came in all is all there is to say.
    peak = tally.pace(start + WARM_SHARE * options.peak_seconds, end) or tally.pace(start, perf_counter())
    return peak, peak * len(trials) / sum(trial.tokens for trial in trials)


async def phase(
    name: str,
    seconds: float,
    loads: Sequence[tuple[Target, float]],
    options: TenantsOptions,
    prompts: Prompts,
) -> tuple[list[Tally], tuple[float, float]]:
    """Requests of several tenants, each at its rate, for so long; what became of those of each, from when to when."""
    tallies = [Tally() for _ in loads]
    plans = [
        await plan(options, prompts, max(2, round(rate * seconds)), f"{name} {number}")
        for number, (_, rate) in enumerate(loads)
    ]
    start = perf_counter()
    with progress_bar(name, sum(map(len, plans))) as on_end:

        async def run(number: int, target: Target, rate: float) -> None:
            tally = tallies[number]

            async def one(trial: Trial, due: float) -> None:
                await send(target, trial, due, tally)
                on_end(not tally.failed)

            await drive(plans[number], OpenLoop(rate, options.seed + number), one)

        async with asyncio.TaskGroup() as group:
            for number, (target, rate) in enumerate(loads):
                group.create_task(run(number, target, rate))
    return tallies, (start, start + seconds)


def problems_of(found: dict[str, Any], tallies: Sequence[Tally], options: TenantsOptions) -> list[str]:
    problems = [f"a request failed: {error}" for tally in tallies for error in tally.errors[:3]]
    for tally in tallies:
        if tally.refused_without_retry:
            problems.append(f"{tally.refused_without_retry} refusals did not say when to come back")
        if tally.sent != tally.whole + tally.cut + tally.refused + tally.failed:
            problems.append("a request has no outcome")
    if found["goodput"] < options.least_goodput:
        problems.append(f"goodput is {found['goodput']:.1%} of the peak, not {options.least_goodput:.0%}")
    elif found["goodput"] > options.most_goodput:
        problems.append(
            f"goodput is {found['goodput']:.1%} of the peak, which was found too low: there was no overload"
        )
    for number, (together, alone) in enumerate(zip(found["quiet"], found["quiet_alone"], strict=True), 1):
        if together["refused"]:
            problems.append(f"quiet tenant {number} was refused {together['refused']} times")
        first, before = together["first_token_p99"], alone["first_token_p99"]
        if first is None or before is None or first > options.most_delay * before:
            problems.append(f"quiet tenant {number}: p99 of the first token is {first} s, alone {before} s")
    if found["memory"] is not None and (problem := memory_problem(found["memory"], found["kv_cache_filled"])):
        problems.append(problem)
    return problems


def print_tenants(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"peak {found['peak_tokens_per_second']} tokens/s, {found['peak_requests_per_second']} requests/s; "
        f"goodput under the flood {found['goodput']:.1%} of it"
    )
    table = Table("tenant", "sent", "whole", "cut", "refused", "failed", "tokens/s", "first token p50", "p99")
    rows = [("flood", found["flood"])]
    for number, (together, alone) in enumerate(zip(found["quiet"], found["quiet_alone"], strict=True), 1):
        rows += [(f"quiet {number}", together), (f"quiet {number}, alone", alone)]
    for name, row in rows:
        counts = [str(row[each]) for each in ("sent", "whole", "cut", "refused", "failed", "tokens_per_second")]
        times = ["–" if row[each] is None else f"{row[each]:.3f} s" for each in ("first_token_p50", "first_token_p99")]
        table.add_row(name, *counts, *times)
    console.print(table)
    if memory := found["memory"]:
        for said in by_process(memory):
            console.print(f"memory of {said}", markup=False)
    for problem in found["problems"]:
        console.print(f"problem: {problem}", style="red", markup=False, highlight=False)
