"""The commands behind the command line: connect, run an experiment, print it. Each returns the exit status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from slipstream.loadtest.abuse import AbuseOptions, abuse, print_abuse, print_head, print_stops
from slipstream.loadtest.arrivals import Arrivals, ClosedLoop
from slipstream.loadtest.compare import Rounds, compare, print_comparison
from slipstream.loadtest.harness import Run, Target, connect, measure
from slipstream.loadtest.latency import PrefixOptions, StallOptions, prefix, print_prefix, print_stall, stall
from slipstream.loadtest.progress import progress_bar
from slipstream.loadtest.report import print_json, print_summary, summarise, summarise_speculation, summarise_steps
from slipstream.loadtest.rollout import RolloutOptions, as_json, plot_rollout, print_rollout, rollout
from slipstream.loadtest.scrape import read_speculation, read_steps
from slipstream.loadtest.soak import SoakOptions, print_soak, soak
from slipstream.loadtest.tenants import TenantsOptions, print_tenants, tenants
from slipstream.loadtest.workloads import Workload, WorkloadOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    url: str
    model: str | None = None
    api_key: str | None = None
    extra: Mapping[str, Any]
    timeout: float

    def connect(self) -> AbstractAsyncContextManager[Target]:
        return connect(self.url, api_key=self.api_key, model=self.model, extra=self.extra, timeout=self.timeout)


def _describe(options: WorkloadOptions, workload: Workload) -> dict[str, Any]:
    return {
        **asdict(options),
        "dataset": options.dataset and options.dataset.name,
        "lengths": "exact" if workload.exact_lengths else "estimated",
    }


async def run_workload(
    server: ServerOptions,
    options: WorkloadOptions,
    arrivals: Arrivals,
    *,
    num_prompts: int,
    warmup: int,
    records_file: Path | None,
) -> int:
    console = Console()
    async with server.connect() as target:
        workload = Workload(options, target.tokenizer)
        requests = await workload.round(warmup + num_prompts)
        await measure(target, requests[:warmup], ClosedLoop(1))
        title = f"{options.name}, {arrivals.describe()}"
        with progress_bar(title, num_prompts) as on_end:
            before = await read_steps(target.client), await read_speculation(target.client)
            run = await measure(target, requests[warmup:], arrivals, on_end)
            after = await read_steps(target.client), await read_speculation(target.client)
        figures = summarise(run)
        if before[0] and after[0]:
            figures |= summarise_steps(after[0] - before[0])
        if before[1] and after[1]:
            figures |= summarise_speculation(after[1] - before[1])
        print_summary(f"{title}: {server.url} ({target.model})", figures, console)
        if not workload.exact_lengths and options.name != "sharegpt":
            console.print("The server has no /tokenize: lengths are estimated at four characters per token.")
        if records_file:
            _write_records(records_file, run)
        described = {"workload": _describe(options, workload), "arrivals": arrivals.describe()}
        print_json(
            {"url": server.url, "model": target.model, **described, "chunk_usage": target.chunk_usage, **figures}
        )
    return 1 if figures["failed"] else 0


def _write_records(path: Path, run: Run) -> None:
    """One JSON object per request, in the order of sending; times are seconds since the first request was sent."""
    origin = min((record.start for record in run.records), default=0.0)
    with path.open("wb") as file:
        for record in run.records:
            fields = asdict(record)
            for name in ("due", "start", "end"):
                fields[name] = round(fields[name] - origin, 6)
            fields["chunk_times"] = [round(time - origin, 6) for time in record.chunk_times]
            file.write(msgspec.json.encode(fields) + b"\n")


async def run_comparison(a: ServerOptions, b: ServerOptions, options: WorkloadOptions, plan: Rounds) -> int:
    async with a.connect() as target_a, b.connect() as target_b:
        # One text for both: its lengths are exact in the tokenizer of A, else of B.
        workload = Workload(options, target_a.tokenizer or target_b.tokenizer)
        result = await compare(target_a, target_b, workload, plan)
        console = Console()
        for name, server, target in (("A", a, target_a), ("B", b, target_b)):
            console.print(f"{name} = {server.url} ({target.model})", markup=False, highlight=False)
        print_comparison(result, console)
        sides = {
            name: {"url": server.url, "model": target.model, "extra": server.extra}
            for name, server, target in (("a", a, target_a), ("b", b, target_b))
        }
        print_json({**sides, "workload": _describe(options, workload), **result})
    return 1 if any(part["failed_a"] or part["failed_b"] for part in result["results"]) else 0


async def run_rollout(servers: Mapping[str, ServerOptions], options: RolloutOptions) -> int:
    async with AsyncExitStack() as stack:
        targets = {name: await stack.enter_async_context(server.connect()) for name, server in servers.items()}
        sides = await rollout(targets, options)
        console = Console()
        print_rollout(sides, options, console)
        if options.plot is not None:
            plot_rollout(sides, options.plot)
            console.print(f"plot: {options.plot}", markup=False, highlight=False)
        files = {"dataset": options.dataset and options.dataset.name, "plot": options.plot and options.plot.name}
        print_json({"rollout": asdict(options) | files, "servers": as_json(sides)})
    return 1 if any(epoch.failed for side in sides for epoch in side.epochs) else 0


async def run_soak(server: ServerOptions, options: SoakOptions) -> int:
    async with server.connect() as target:
        result = await soak(target, options)
        print_soak(result, Console())
        print_json({"url": server.url, "model": target.model, **result})
    return 1 if result["problems"] else 0


async def run_tenants(flood: ServerOptions, quiet: Sequence[ServerOptions], options: TenantsOptions) -> int:
    async with AsyncExitStack() as stack:
        targets = [await stack.enter_async_context(server.connect()) for server in (flood, *quiet)]
        result = await tenants(targets[0], targets[1:], options)
        print_tenants(result, Console())
        print_json({"url": flood.url, "model": targets[0].model, **result})
    return 1 if result["problems"] else 0


async def run_stall(server: ServerOptions, whole: ServerOptions | None, options: StallOptions) -> int:
    """``whole`` is a server that computes long prompts in one piece."""
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(server.connect())
        other = await stack.enter_async_context(whole.connect()) if whole else None
        result = await stall(target, other, options)
        print_stall(result, Console())
        print_json({"url": server.url, "whole_url": whole and whole.url, "model": target.model, **result})
    return 0


async def run_prefix(server: ServerOptions, options: PrefixOptions) -> int:
    async with server.connect() as target:
        result = await prefix(target, options)
        print_prefix(result, Console())
        print_json({"url": server.url, "model": target.model, **result})
    return 0


async def run_abuse(server: ServerOptions, options: AbuseOptions) -> int:
    async with server.connect() as target:
        console = Console()
        print_head(console)
        result = await abuse(target, server.url, server.api_key, options, lambda stops: print_stops(console, stops))
        print_abuse(console, result, options)
        print_json({"url": server.url, **asdict(result), "failures": result.failures(options)})
    return 1 if result.failures(options) else 0
