"""``slipstream drafter train`` and ``eval``: the training worker and its gate without a server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.traffic.index import TrafficIndex
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.server.commands.drafter import (
    AsJson,
    Folder,
    Lineage,
    Model,
    Quantized,
    open_registry,
    print_json,
)
from slipstream.server.commands.tables import cell, new_table, show_table
from slipstream.server.evolution.config import check_device_name, check_route

Traffic = Annotated[Path, typer.Option(help="The --traffic-folder of a server.", envvar="SLIPSTREAM_TRAFFIC_FOLDER")]
TrainedRoute = Annotated[str, typer.Option(help="tenant:NAME or domain:NAME; empty for the route all share.")]
Device = Annotated[
    str,
    typer.Option(
        help="Where it computes: cpu, cuda (a GPU with room for it), cuda:1 (that one), or auto: a GPU with room, or "
        "else the CPU.",
        envvar="SLIPSTREAM_EVOLVE_DEVICE",
    ),
]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0 takes every core.")]


def train(
    registry: Folder,
    traffic_folder: Traffic,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=60 * 24 * 366,
            help="How long; then what was learned last is judged, too. Without it, until it is ended: where there is "
            "nothing left to learn it waits for more traffic, as beside a server.",
        ),
    ] = None,
    model: Model = "default",
    target_lineage: Lineage = "",
    quantize: Quantized = "none",
    route: TrainedRoute = "",
    loss: Annotated[
        Literal["auto", "ce", "kl", "rkl", "jsd", "tv", "tvpp", "nla", "lk", "race"],
        typer.Option(
            help="What is minimised; auto: cross-entropy for greedy traffic, forward KL for sampled.",
            envvar="SLIPSTREAM_EVOLVE_LOSS",
        ),
    ] = "auto",
    first_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of answers with which the first round begins; with --minutes as many as there are.",
            envvar="SLIPSTREAM_EVOLVE_FIRST_TOKENS",
        ),
    ] = None,
    round_tokens: Annotated[
        int,
        typer.Option(min=1, help="Positions learned between two versions.", envvar="SLIPSTREAM_EVOLVE_ROUND_TOKENS"),
    ] = 100_000,
    threads: Threads = 0,
    device: Device = "auto",
    promote: Annotated[bool, typer.Option(help="Make versions live that pass the gate; a pinned one stays.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train on kept traffic without a server, as its worker does; Ctrl-C or SIGTERM ends it early."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from slipstream.drafter.training.control import Control, Report  # imports torch
    from slipstream.drafter.training.course import WorkerOptions
    from slipstream.drafter.training.device import memory_errors
    from slipstream.drafter.training.worker import Worker

    check_device_name(device, "device")
    if route:
        check_route(route, "route")
    TrafficIndex(traffic_folder).close()  # says so where there is none
    versions = Registry(registry)
    options = WorkerOptions(
        model=model,
        lineage=target_lineage,
        quantize=quantize,
        traffic=str(traffic_folder),
        registry=str(registry),
        routes=(route,),
        loss=None if loss == "auto" else loss,
        round_tokens=round_tokens,
        threads=threads or None,
        device=device,
    )
    if minutes is not None:
        options = msgspec.structs.replace(options, first_tokens=1, epochs=1e9)  # on what there is, as long as asked for
    if first_tokens is not None:
        options = msgspec.structs.replace(options, first_tokens=first_tokens)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    began, published, tokens, said = time.monotonic(), [], 0, ""
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("starting", total=None if minutes is None else minutes * 60)

        def show(told: Report) -> None:
            nonlocal tokens, said
            if told.message != said and told.state in ("waiting", "failed") and told.message:
                progress.print(told.message)
            tokens, said = max(tokens, told.tokens), told.message if told.state == "waiting" else said
            what = f"{told.state}: step {told.step}, {told.tokens:,} tokens, {told.tokens_per_second:,.0f} per second"
            what += f", loss {told.loss:.3f}" if told.loss else ""
            progress.update(bar, description=what, completed=time.monotonic() - began)
            if told.state in ("published", "refused"):
                name = f"version {told.version}" if told.version else "no version"
                progress.print(f"{told.tokens:,} tokens: {name}, {told.message}")
            if told.state == "published" and versions.get(told.version).route == route:
                published.append(told.version)
                live = versions.live(route)
                if promote and not (live and live.pinned):
                    versions.promote(told.version, "trained offline and passed the gate")

        ready, over = threading.Event(), threading.Event()
        stopping = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, lambda *_: over.set()) for number in stopping]
        try:
            seconds = None if minutes is None else minutes * 60
            with memory_errors():
                worker = Worker(options, Control("always", until(ready, over, seconds), show))
                began = time.monotonic()
                ready.set()
                worker.run()
        finally:
            for number, handler in zip(stopping, before, strict=True):
                signal.signal(number, handler)
    if not tokens and minutes is not None:
        why = said or f"{traffic_folder} has no texts for {route or 'the shared route'}"
        raise ConfigError(f"nothing was learned: {why}")
    if as_json:
        return print_json({"tokens": tokens, "versions": [versions.get(number) for number in published]})
    print(f"learned {tokens:,} tokens; versions that passed the gate: {', '.join(map(str, published)) or 'none'}")


def until(ready: threading.Event, over: threading.Event, seconds: float | None) -> Iterator[str]:
    """What the worker is told: to finish when the time is over, or when ``over`` says so."""
    ready.wait()
    over.wait(seconds)
    yield '{"type":"finish"}'
    threading.Event().wait()  # the line stays open until the worker has ended


def evaluate_head(
    registry: Folder,
    head: Annotated[str, typer.Argument(metavar="VERSION|FOLDER", help="Number of a version, or folder of a head.")],
    traffic_folder: Traffic,
    model: Model = "default",
    target_lineage: Lineage = "",
    quantize: Quantized = "none",
    route: TrainedRoute = "",
    texts: Annotated[int, typer.Option(min=1, help="How many, the latest ones.")] = 200,
    depth: Annotated[int, typer.Option(min=1, max=15, help="Draft tokens in a row.")] = 3,
    everything: Annotated[bool, typer.Option("--all", help="Also texts that training may have seen.")] = False,
    threads: Threads = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a head as the gate does, on kept traffic that training does not see, against the live version."""
    import torch

    from slipstream.drafter.training.course import WorkerOptions
    from slipstream.drafter.training.device import memory_errors
    from slipstream.drafter.training.evaluate import evaluate

    check_device_name(device, "device")
    if route:
        check_route(route, "route")
    if threads:
        torch.set_num_threads(threads)
    options = WorkerOptions(
        model=model,
        lineage=target_lineage,
        quantize=quantize,
        traffic=str(traffic_folder),
        registry=str(registry),
        routes=(route,),
        gate_texts=texts,
        depth=depth,
        device=device,
    )
    opened = None
    with suppress(*() if head.isdecimal() else (ModelError,)):  # a folder can be scored without a registry
        opened = open_registry(registry)
    with memory_errors():
        found = evaluate(int(head) if head.isdecimal() else Path(head), options, opened, everything)
    if as_json:
        return print_json(found)
    verdict = found.verdict
    live = "no drafter" if found.live is None else f"version {found.live} (live)"
    table = new_table("accept length with", cell(head), live)
    for count, (ours, theirs) in enumerate(zip(found.accept_lengths, found.live_accept_lengths, strict=True), 1):
        table.add_row(f"{count} draft token{'s' if count > 1 else ''}", f"{ours:.3f}", f"{theirs:.3f}")
    show_table(table)
    what = "passes the gate" if verdict.passes else "does not pass the gate"
    print(f"{what}: at least {verdict.least_ratio:.3f} times the live one with 97.5 %; {verdict.describe()}")
