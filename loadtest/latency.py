"""Two focused experiments: a long prompt arriving among running streams, and a prompt sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from slipstream.clients.errors import ClientError
from slipstream.loadtest.harness import Target, receive
from slipstream.loadtest.progress import progress_bar
from slipstream.loadtest.record import RequestRecord
from slipstream.loadtest.workloads import Request, Workload, WorkloadOptions

STARTED_CHUNKS = 4
STREAM_TOKENS = 2048
ANSWER_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StallOptions:
    streams: int = 8
    long_tokens: int = 4000
    rounds: int = 5
    window: float = 4.0
    """Seconds measured before the long prompt is sent."""
    seed: int = 0
    dataset: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixOptions:
    prefix_tokens: int = 1000
    rounds: int = 10
    seed: int = 0
    dataset: Path | None = None


def new_record() -> RequestRecord:
    now = perf_counter()
    return RequestRecord(due=now, start=now)


def gaps(records: Sequence[RequestRecord]) -> Iterator[tuple[float, float]]:
    """Every pair of neighbouring token chunks: when the earlier and when the later one came."""
    for record in records:
        yield from pairwise(record.chunk_times)


def gaps_within(records: Sequence[RequestRecord], start: float, end: float) -> list[float]:
    """Seconds of the gaps that begin and end between ``start`` and ``end``."""
    return [later - earlier for earlier, later in gaps(records) if start <= earlier and later <= end]


def gaps_overlapping(records: Sequence[RequestRecord], start: float, end: float) -> list[float]:
    """Seconds of the gaps of which any part lies between ``start`` and ``end``."""
    return [later - earlier for earlier, later in gaps(records) if earlier < end and later > start]


def ratio_spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": round(median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "rounds": [round(value, 4) for value in values],
    }


def p99_ms(gaps: Sequence[float]) -> float:
    return float(np.percentile(gaps, 99)) * 1e3


async def stall(target: Target, whole: Target | None, options: StallOptions) -> dict[str, Any]:
    """Per round: p99 and longest gap of the streams before and while the long prompt is computed, and its TTFT.

    ``whole`` is a second server, measured in turn with the same prompts, to compare the TTFT with.
    """
    workload = Workload(
        WorkloadOptions(output_tokens=STREAM_TOKENS, ignore_eos=True, seed=options.seed, dataset=options.dataset),
        target.tokenizer,
    )
    rounds: list[dict[str, float]] = []
    whole_rounds: list[dict[str, float]] = []
    order = [(target, rounds)] + ([(whole, whole_rounds)] if whole else [])
    with progress_bar("stall", options.rounds) as advance:
        for _ in range(options.rounds):
            streams = await workload.round(options.streams)
            long = workload.summarise(await workload.text(options.long_tokens))
            long.body["max_tokens"] = ANSWER_TOKENS
            for server, results in order:
                results.append(await stall_round(server, streams, long, options.window))
            order.reverse()
            advance(True)
    result: dict[str, Any] = {
        "streams": options.streams,
        "long_tokens": rounds[0]["long_tokens"],
        "p99_itl_without_ms": round(median(each["p99_without_ms"] for each in rounds), 3),
        "p99_itl_with_ms": round(median(each["p99_with_ms"] for each in rounds), 3),
        "p99_itl_ratio": ratio_spread([each["p99_with_ms"] / each["p99_without_ms"] for each in rounds]),
        "max_itl_without_ms": round(median(each["max_without_ms"] for each in rounds), 3),
        "max_itl_with_ms": round(median(each["max_with_ms"] for each in rounds), 3),
        "long_ttft_ms": round(median(each["long_ttft_ms"] for each in rounds), 3),
        "rounds": rounds,
    }
    if whole_rounds:
        result["whole_p99_itl_with_ms"] = round(median(each["p99_with_ms"] for each in whole_rounds), 3)
        result["whole_long_ttft_ms"] = round(median(each["long_ttft_ms"] for each in whole_rounds), 3)
        result["long_ttft_ratio"] = ratio_spread(
            [one["long_ttft_ms"] / other["long_ttft_ms"] for one, other in zip(rounds, whole_rounds, strict=True)]
        )
        result["whole_rounds"] = whole_rounds
    return result


async def stall_round(target: Target, streams: Sequence[Request], long: Request, window: float) -> dict[str, float]:
    """Start the streams, measure ``window`` seconds, send the long prompt, measure until its first token."""
    records = [new_record() for _ in streams]
    tasks = [
        asyncio.create_task(receive(target, request, record)) for request, record in zip(streams, records, strict=True)
    ]
    try:
        await _chunks_arrive(records, tasks, [STARTED_CHUNKS] * len(records))
        calm_start = perf_counter()
        await asyncio.sleep(window)
        arrival = new_record()
        await receive(target, long, arrival)
        if arrival.error or not arrival.chunk_times:
            raise ClientError(f"the long prompt failed: {arrival.error or 'it had no answer'}")
        # The gap in which the first token came ends with the next chunk of each stream.
        await _chunks_arrive(records, tasks, [len(record.chunk_times) + 1 for record in records])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    calm = gaps_within(records, calm_start, arrival.start)
    busy = gaps_overlapping(records, arrival.start, arrival.chunk_times[0])
    if not calm:
        raise ClientError(f"no token came in {window:g} s before the long prompt: choose a longer --window")
    ttft = arrival.ttft()
    assert ttft is not None
    return {
        "p99_without_ms": round(p99_ms(calm), 3),
        "max_without_ms": round(max(calm) * 1e3, 3),
        "p99_with_ms": round(p99_ms(busy), 3),
        "max_with_ms": round(max(busy) * 1e3, 3),
        "long_ttft_ms": round(ttft * 1e3, 3),
        "long_tokens": arrival.prompt_tokens or 0,
    }


async def _chunks_arrive(
    records: Sequence[RequestRecord], tasks: Sequence[asyncio.Task[bool]], counts: Sequence[int]
) -> None:
    while any(len(record.chunk_times) < count for record, count in zip(records, counts, strict=True)):
        for record, task in zip(records, tasks, strict=True):
            if task.done():
                task.result()
                raise ClientError(
                    f"a stream ended before the long prompt was done: {record.error or record.finish_reasons}"
                )
        await asyncio.sleep(0.005)


async def prefix(target: Target, options: PrefixOptions) -> dict[str, Any]:
    """TTFT of fresh prompts and of the same prompts once more, one request at a time."""
    workload = Workload(WorkloadOptions(output_tokens=2, seed=options.seed, dataset=options.dataset), target.tokenizer)
    first, second, prompt_tokens = [], [], []
    with progress_bar("prefix", options.rounds) as advance:
        for _ in range(options.rounds):
            request = workload.summarise(await workload.text(options.prefix_tokens))
            times = []
            for _ in range(2):
                record = new_record()
                await receive(target, request, record)
                ttft = record.ttft()
                if record.error or ttft is None:
                    raise ClientError(f"a request failed: {record.error or 'it had no answer'}")
                times.append(ttft * 1e3)
            first.append(times[0])
            second.append(times[1])
            prompt_tokens.append(record.prompt_tokens or 0)
            advance(True)
    return {
        "prompt_tokens": median(prompt_tokens),
        "first_ttft_ms": round(median(first), 3),
        "second_ttft_ms": round(median(second), 3),
        "ratio": ratio_spread([a / b for a, b in zip(first, second, strict=True)]),
    }


def print_stall(result: dict[str, Any], console: Console) -> None:
    title = f"{result['streams']} streams, a prompt of {result['long_tokens']} tokens arrives"
    table = Table("milliseconds", "before", "while it is computed", title=title, title_justify="left")
    for name, label in (("p99", "p99 inter-token latency"), ("max", "longest inter-token latency")):
        table.add_row(label, *(f"{result[f'{name}_itl_{when}_ms']:.1f}" for when in ("without", "with")))
    console.print(table)
    ratio = result["p99_itl_ratio"]
    console.print(f"p99 ratio {ratio['median']:.2f} ({ratio['min']:.2f} – {ratio['max']:.2f})")
    console.print(f"TTFT of the long prompt {result['long_ttft_ms']:.0f} ms")
    if ratio := result.get("long_ttft_ratio"):
        console.print(f"without chunking: {result['whole_long_ttft_ms']:.0f} ms")
        console.print(f"TTFT ratio {ratio['median']:.2f} ({ratio['min']:.2f} – {ratio['max']:.2f})")
        console.print(f"without chunking, p99 while it is computed: {result['whole_p99_itl_with_ms']:.1f} ms")


def print_prefix(result: dict[str, Any], console: Console) -> None:
    console.print(f"prompt of {result['prompt_tokens']:g} tokens: TTFT {result['first_ttft_ms']:.1f} ms the first time")
    console.print(f"{result['second_ttft_ms']:.1f} ms the second time")
    ratio = result["ratio"]
    console.print(f"first/second {ratio['median']:.2f} ({ratio['min']:.2f} – {ratio['max']:.2f})")
