"""Batches of rollouts as reinforcement learning asks for them: all at once, over when the longest answer is.

The time of such a batch is the time of its longest answers, which are alone at its end. So a batch here has real
prompts, several sampled answers of each, and lengths with a heavy tail, given or the model's own; the same prompts come
again in every epoch, with other samples. Servers have turns, in alternating order.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import NormalDist
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from slipstream.clients.aio import AsyncClient
from slipstream.clients.errors import ClientError
from slipstream.loadtest.arrivals import OpenLoop
from slipstream.loadtest.harness import Run, Target, measure
from slipstream.loadtest.plots import Line, Panel, require_plot, write_plot
from slipstream.loadtest.processes import ProcessTree, serving
from slipstream.loadtest.progress import progress_bar
from slipstream.loadtest.scrape import Tokens, read_tokens, wait_idle
from slipstream.loadtest.workloads import Request, Workload, WorkloadOptions

POLL_SECONDS = 0.5
SETTLE_SECONDS = 60.0
SWITCHED = 0.5
"""Speculation counts as on while more than this share of the rows of steps verify draft tokens."""
TAIL_QUANTILE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutOptions:
    prompts: int = 12
    samples: int = 4
    """Answers per prompt."""
    epochs: int = 3
    temperature: float = 1.0
    median_tokens: int = 48
    tail: float = 8.0
    """The longest twentieth of the answers is at least so many times as long as the median."""
    longest: int = 1000
    """Most tokens of an answer."""
    natural: bool = False
    """Answers may end earlier, where the model ends them: servers that sample alike still write the same ones."""
    pause: float = 0.0
    """Seconds between two epochs, in which a trainer would compute; a server that learns while idle learns then."""
    freeze: bool = False
    """Servers stand still while it is another one's turn: for those that also work without requests."""
    seed: int = 0
    dataset: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if min(self.prompts, self.samples, self.epochs, self.median_tokens) < 1:
            raise ValueError("prompts, samples, epochs and the median length must be at least 1")
        if self.tail < 1 or self.longest < self.tail * self.median_tokens:
            raise ValueError(
                f"a tail of {self.tail:g} times the median of {self.median_tokens} tokens needs answers of "
                f"{self.tail * self.median_tokens:g} tokens; --longest is {self.longest}"
            )
        if self.pause < 0:
            raise ValueError("the pause between two epochs is at least 0 seconds")
        if self.plot is not None:
            require_plot(self.plot)

    def lengths(self) -> list[int]:
        """Most tokens of each answer: the quantiles of a log-normal distribution, in random order."""
        normal = NormalDist()
        sigma = math.log(self.tail) / normal.inv_cdf(TAIL_QUANTILE)
        count = self.prompts * self.samples
        places = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
        lengths = [min(max(round(self.median_tokens * math.exp(sigma * z)), 1), self.longest) for z in places]
        Random(f"lengths {self.seed}").shuffle(lengths)
        return lengths


def batches(asked: Sequence[Request], options: RolloutOptions) -> list[list[Request]]:
    """One list per epoch: every prompt ``samples`` times, with bounds that stay and seeds that do not."""
    lengths = options.lengths()
    epochs = []
    for epoch in range(options.epochs):
        requests = []
        for index, length in enumerate(lengths):
            request = asked[index // options.samples]
            fields = {"max_tokens": length, "temperature": options.temperature}
            if not options.natural:
                # Stop tokens are masked until then, so that every server writes the same number of tokens.
                fields["min_tokens"] = length
            seed = (options.seed * options.epochs + epoch) * len(lengths) + index
            requests.append(Request(request.path, {**request.body, **fields, "seed": seed}))
        epochs.append(requests)
    return epochs


@dataclass(frozen=True, slots=True)
class Epoch:
    """One batch on one server; times in seconds from its start."""

    seconds: float
    lengths: list[int]
    """Tokens of the answers that did not fail."""
    failed: int
    errors: list[str]
    running: list[tuple[float, int]]
    """When the number of open requests changed, and to what."""
    tokens_per_step: float | None
    """Tokens per request and step; None where the server does not say."""
    switch: tuple[float, int] | None
    """When speculation came in for good, and the number of open requests at that time; None if it never did."""

    @property
    def output_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def throughput(self) -> float:
        return self.output_tokens / self.seconds


@dataclass(slots=True)
class Side:
    name: str
    target: Target
    processes: ProcessTree | None
    epochs: list[Epoch] = field(default_factory=list)


async def rollout(targets: Mapping[str, Target], options: RolloutOptions) -> list[Side]:
    """Every server's epochs. Raises ClientError if one is busy with other requests."""
    first = next(iter(targets.values()))
    workload = Workload(WorkloadOptions(name="sharegpt", seed=options.seed, dataset=options.dataset), first.tokenizer)
    epochs = batches(await workload.round(options.prompts), options)
    chunk_usage = all(target.chunk_usage for target in targets.values())
    sides = [
        Side(name, replace(target, chunk_usage=chunk_usage), serving(target.client.base_url))
        for name, target in targets.items()
    ]
    if options.freeze and not all(side.processes for side in sides):
        raise ClientError("only servers on this machine, of the same user, can be frozen")
    for number, requests in enumerate(epochs):
        for side in sides if number % 2 == 0 else reversed(sides):
            with ExitStack() as stack:
                for other in sides if options.freeze else ():
                    if other is not side and other.processes:
                        stack.enter_context(other.processes.frozen())
                if number and options.pause:
                    await asyncio.sleep(options.pause)
                title = f"epoch {number + 1}, {side.name}"
                on_end = stack.enter_context(progress_bar(title, len(requests)))
                side.epochs.append(await _epoch(side.target, requests, on_end))
    return sides


async def _epoch(target: Target, requests: Sequence[Request], on_end: Callable[[bool], None]) -> Epoch:
    load = await wait_idle(target.client, SETTLE_SECONDS)
    if load is not None and not load.idle:
        raise ClientError(f"{target.client.base_url} still works on other requests: rollouts need it for themselves")
    watch = Watch(target.client)
    await watch.look()
    task = asyncio.create_task(watch.run())
    try:
        run = await measure(target, requests, OpenLoop(math.inf), on_end)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await watch.look()
    return summarise_epoch(run, watch.seen)


class Watch:
    """What a server has counted, looked at now and then."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.seen: list[tuple[float, Tokens]] = []
        """perf_counter() and counts; empty for a server without them."""

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.look()

    async def look(self) -> None:
        counts = await read_tokens(self._client)
        if counts is not None:
            self.seen.append((perf_counter(), counts))


def summarise_epoch(run: Run, seen: Sequence[tuple[float, Tokens]]) -> Epoch:
    """``seen``: what the server had counted before, meanwhile and after."""
    began = min(record.start for record in run.records)
    running = open_requests([(record.start - began, record.end - began) for record in run.records])
    whole = seen[-1][1] - seen[0][1] if seen else None
    failed = [record for record in run.records if not record.ok]
    switched = switch([(time - began, counts) for time, counts in seen])
    return Epoch(
        seconds=run.duration,
        lengths=[record.output_tokens for record in run.records if record.ok],
        failed=len(failed),
        errors=sorted({record.error or "" for record in failed})[:10],
        running=running,
        tokens_per_step=whole.per_step if whole else None,
        switch=None if switched is None else (switched, at(running, switched)),
    )


def open_requests(spans: Sequence[tuple[float, float]]) -> list[tuple[float, int]]:
    """When the number of open requests changes, and to what, from their first and last seconds."""
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    running, count = [], 0
    for time, change in changes:
        count += change
        running.append((time, count))
    return running


def at(running: Sequence[tuple[float, int]], time: float) -> int:
    """The number of open requests at that time."""
    return next((count for when, count in reversed(running) if when <= time), 0)


def switch(seen: Sequence[tuple[float, Tokens]]) -> float | None:
    """Since when most rows verified draft tokens, up to the end; None if at the end they did not."""
    began = None
    for (before, earlier), (_, later) in reversed(list(pairwise(seen))):
        counts = later - earlier
        if counts.rows <= 0:
            continue  # nothing was sampled meanwhile
        if counts.drafts / counts.rows <= SWITCHED:
            break
        began = before
    return None if began is None else max(began, 0.0)


def as_json(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """The figures of every side and epoch; ratios are to the second side, if there is one."""
    return [
        {
            "name": side.name,
            "url": side.target.client.base_url,
            "model": side.target.model,
            "epochs": [
                {
                    "seconds": round(epoch.seconds, 3),
                    "output_tokens": epoch.output_tokens,
                    "output_throughput": round(epoch.throughput, 3),
                    "failed": epoch.failed,
                    "errors": epoch.errors,
                    "tokens_per_step": epoch.tokens_per_step and round(epoch.tokens_per_step, 4),
                    "switch": epoch.switch,
                    "faster": [round(faster(epoch, other.epochs[number]), 4) for other in sides],
                }
                for number, epoch in enumerate(side.epochs)
            ],
        }
        for side in sides
    ]


def faster(epoch: Epoch, other: Epoch) -> float:
    """How many times as fast as the other: by time, or by tokens where a server wrote fewer than it was to."""
    return epoch.throughput / other.throughput if other.output_tokens and epoch.output_tokens else 0.0


def print_rollout(sides: Sequence[Side], options: RolloutOptions, console: Console) -> None:
    lengths = sides[0].epochs[0].lengths if options.natural else options.lengths()
    console.print(
        f"{options.prompts} prompts, {options.samples} answers each, temperature {options.temperature:g}, "
        f"{describe(lengths)}",
        highlight=False,
    )
    columns = ["epoch", "server", "seconds", "tokens/s", *(f"against {side.name}" for side in sides[1:])]
    table = Table(*columns, "tokens per step", "speculation from")
    for column in table.columns[2:]:
        column.justify = "right"
    for number in range(options.epochs):
        for side in sides:
            epoch = side.epochs[number]
            table.add_row(
                str(number + 1),
                side.name,
                f"{epoch.seconds:.1f}",
                f"{epoch.throughput:.1f}",
                *(f"{faster(epoch, other.epochs[number]):.2f}" for other in sides[1:]),
                "" if epoch.tokens_per_step is None else f"{epoch.tokens_per_step:.2f}",
                "" if epoch.switch is None else f"{epoch.switch[0]:.0f} s, {epoch.switch[1]} running",
            )
        table.add_section()
    console.print(table)
    for side in sides:
        wrong = {epoch.output_tokens for epoch in side.epochs} - {sum(lengths)}
        if wrong and not options.natural:
            console.print(
                f"{side.name} wrote {', '.join(map(str, sorted(wrong)))} tokens in an epoch, not {sum(lengths)}"
            )
        errors = [error for epoch in side.epochs for error in epoch.errors]
        if errors:
            console.print(f"{side.name}: failed requests, e.g. {errors[0]}", markup=False)


def describe(lengths: Sequence[int]) -> str:
    """The tokens of answers: how many, the median, the least of the longest twentieth, and the most."""
    ordered = sorted(lengths) or [0]
    tail = ordered[math.ceil(TAIL_QUANTILE * len(ordered)) - 1]
    middle = ordered[len(ordered) // 2]
    return f"{sum(ordered)} tokens: median {middle}, the longest 5 % from {tail}, longest {ordered[-1]}"


def plot_rollout(sides: Sequence[Side], path: Path) -> None:
    """Open requests over time, an epoch below the other; marked where speculation comes in."""
    panels = []
    for number in range(len(sides[0].epochs)):
        epochs = [(side.name, side.epochs[number]) for side in sides]
        marks = [(epoch.switch[0], f"{name} speculates") for name, epoch in epochs if epoch.switch]
        lines = [Line(name, epoch.running, steps=True) for name, epoch in epochs]
        panels.append(Panel(f"epoch {number + 1}", "running requests", lines, marks=marks))
    write_plot(path, "slipstream bench rollout", "seconds since the batch was sent", panels)
