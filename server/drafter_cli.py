"""``slipstream drafter``: the versions of a drafter, their files and states. Works beside a running server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slipstream.drafter.registry.registry import Registry, default_folder
from slipstream.drafter.registry.states import Version
from slipstream.drafter.traffic.index import TrafficIndex
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.server.evolution.config import check_route
from slipstream.server.log import printable

drafter_app = typer.Typer(
    help="List, compare, train, evaluate, promote, exchange and delete the versions of a drafter.",
    no_args_is_help=True,
)

Folder = Annotated[
    Path,
    typer.Option(
        "--registry", envvar="SLIPSTREAM_REGISTRY", help="Folder of the registry.", default_factory=default_folder
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Number = Annotated[int, typer.Argument(help="Number of the version.", metavar="VERSION")]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]
Route = Annotated[str, typer.Option(help="Tenant or domain; empty for the route all share.")]
Traffic = Annotated[Path, typer.Option(help="The --traffic-folder of a server.", envvar="SLIPSTREAM_TRAFFIC_FOLDER")]
Model = Annotated[
    str, typer.Option(help="The model it drafts for: folder, GGUF file, or 'default'.", envvar="SLIPSTREAM_MODEL")
]
Lineage = Annotated[
    str,
    typer.Option(
        help="The --target-lineage of the server whose traffic, or versions, these are.",
        envvar="SLIPSTREAM_TARGET_LINEAGE",
    ),
]
TrainedRoute = Annotated[str, typer.Option(help="tenant:NAME or domain:NAME; empty for the route all share.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0 takes every core.")]


def open_registry(folder: Path) -> Registry:
    return Registry(folder, create=False)


@drafter_app.command("list")
def list_versions(
    registry: Folder,
    route: Annotated[str | None, typer.Option(help="Only of this tenant or domain.")] = None,
    pruned: Annotated[bool, typer.Option("--pruned", help="Also those whose weights are deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """List versions, oldest first."""
    versions = open_registry(registry).list(route, pruned)
    if as_json:
        return print_json(versions)
    table = Table("version", "route", "state", "from", "origin", "tokens", "gate", "serving", "made", box=box.SIMPLE)
    for each in versions:
        made = each.manifest
        table.add_row(
            str(each.version) + (" pinned" if each.pinned else ""),
            cell(each.route),
            each.state + (" damaged" if each.damage else ""),
            "" if made.parent is None else str(made.parent),
            made.origin,
            f"{made.training.tokens:,}" if made.training.tokens else "",
            numbers(made.gate),
            numbers(each.metrics),
            f"{made.created_at.astimezone():%Y-%m-%d %H:%M}",
        )
    show_table(table)


@drafter_app.command()
def show(registry: Folder, version: Number, as_json: AsJson = False) -> None:
    """Show all that is known of a version, and what happened to it."""
    opened = open_registry(registry)
    found, history = opened.get(version), opened.history(version)
    if as_json:
        return print_json({"version": found, "history": history})
    manifest = msgspec.to_builtins(found.manifest)
    fields = {"route": found.route, "state": found.state, "pinned": found.pinned} | manifest
    if found.damage:
        fields["damage"] = found.damage
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in (fields | {"serving": found.metrics}).items():
        shown = ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, dict) else value
        table.add_row(name, cell(str(shown)))
    show_table(table)
    events = Table("time", "what", "from", "to", "reason", box=box.SIMPLE)
    for event in history:
        when = datetime.fromtimestamp(event.time, UTC).astimezone()
        events.add_row(f"{when:%Y-%m-%d %H:%M:%S}", event.action, event.before, event.after, cell(event.reason))
    show_table(events)


@drafter_app.command()
def diff(
    registry: Folder,
    a: Annotated[int, typer.Argument(metavar="A", help="Number of a version.")],
    b: Annotated[int, typer.Argument(metavar="B", help="Number of another one.")],
    as_json: AsJson = False,
) -> None:
    """Compare two versions: manifests, scores, and how far each tensor moved."""
    from slipstream.drafter.registry.difference import compare

    difference = compare(open_registry(registry), a, b)
    if as_json:
        return print_json(difference)
    table = Table("", f"version {a}", f"version {b}", "change", box=box.SIMPLE)
    for name, (left, right) in difference.fields.items():
        table.add_row(cell(name), cell(text(left)), cell(text(right)))
    for kind, scores in (("gate", difference.gate), ("serving", difference.metrics)):
        for name, (before, after) in scores.items():
            change = f"{after - before:+.4g}" if before is not None and after is not None else ""
            table.add_row(f"{kind} {cell(name)}", text(before), text(after), change)
    for name, moved in difference.weights.items():
        table.add_row(cell(name), "", "", "not comparable" if moved is None else f"{moved:.2%}")
    show_table(table)


@drafter_app.command()
def promote(registry: Folder, version: Number, reason: Reason = "", as_json: AsJson = False) -> None:
    """Make a version live without asking gate or canary; the live one is retired."""
    report(open_registry(registry).promote(version, reason or "by hand"), "is live", as_json)


@drafter_app.command()
def rollback(registry: Folder, route: Route = "", reason: Reason = "", as_json: AsJson = False) -> None:
    """Take the canary out; without one, take the live version out and bring back the one before."""
    now = open_registry(registry).roll_back(route, reason or "by hand")
    if as_json:
        print_json(now)
    elif now is None:
        print("no version is live")
    else:
        report(now, "is live", as_json)


@drafter_app.command()
def pin(registry: Folder, version: Number, reason: Reason = "", as_json: AsJson = False) -> None:
    """Keep a version from being pruned."""
    report(open_registry(registry).pin(version, reason), "is pinned", as_json)


@drafter_app.command()
def unpin(registry: Folder, version: Number, reason: Reason = "", as_json: AsJson = False) -> None:
    """Undo pin."""
    report(open_registry(registry).unpin(version, reason), "is not pinned", as_json)


@drafter_app.command()
def export(
    registry: Folder,
    version: Number,
    folder: Annotated[Path, typer.Argument(help="New folder for config.json and model.safetensors.")],
    as_json: AsJson = False,
) -> None:
    """Write a version in the published EAGLE layout, as SGLang and vLLM load it."""
    from slipstream.drafter.registry.exchange import export_version

    cautions = export_version(open_registry(registry), version, folder)
    if as_json:
        return print_json({"version": version, "folder": str(folder), "notes": cautions})
    print(f"version {version} is in {folder}")
    for caution in cautions:
        print(f"note: {caution}")


@drafter_app.command("import")
def import_folder(
    registry: Folder,
    folder: Annotated[Path, typer.Argument(help="An EAGLE head, or a version folder of another registry.")],
    target: Model = "default",
    target_lineage: Lineage = "",
    route: Route = "",
    note: Annotated[str, typer.Option(help="Kept in the manifest.")] = "",
    as_json: AsJson = False,
) -> None:
    """Add a head from elsewhere as a candidate."""
    from slipstream.drafter.registry.exchange import import_head
    from slipstream.engine.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(target)
    added = import_head(Registry(registry), folder, checkpoint, lineage=target_lineage, route=route, note=note)
    report(added, "is a candidate", as_json)


@drafter_app.command()
def prune(
    registry: Folder,
    keep: Annotated[int, typer.Option(min=0, help="How many to keep per route.")],
    route: Annotated[str | None, typer.Option(help="Only of this tenant or domain.")] = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Delete the weights of old versions; live, canary and pinned ones stay, and what a rollback needs."""
    pruned = open_registry(registry).prune(keep, route, reason or "by hand")
    if as_json:
        return print_json(pruned)
    print(f"pruned: {', '.join(map(str, pruned))}" if pruned else "nothing to prune")


@drafter_app.command()
def train(
    registry: Folder,
    traffic_folder: Traffic,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How long; then what was learned last is judged, too. Without it, until it is ended: where there is "
            "nothing left to learn it waits for more traffic, as beside a server.",
        ),
    ] = None,
    model: Model = "default",
    target_lineage: Lineage = "",
    route: TrainedRoute = "",
    loss: Annotated[
        Literal["auto", "ce", "kl", "rkl", "jsd", "tv", "tvpp", "nla", "lk"],
        typer.Option(help="What is minimised; auto: cross-entropy for greedy traffic, forward KL for sampled."),
    ] = "auto",
    round_tokens: Annotated[int, typer.Option(min=1, help="Positions learned between two versions.")] = 100_000,
    threads: Threads = 0,
    promote: Annotated[bool, typer.Option(help="Make versions live that pass the gate; a pinned one stays.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train on kept traffic without a server, as its worker does; Ctrl-C or SIGTERM ends it early."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from slipstream.drafter.training.control import Control, Report  # imports torch
    from slipstream.drafter.training.course import WorkerOptions
    from slipstream.drafter.training.worker import Worker

    if route:
        check_route(route, "route")
    TrafficIndex(traffic_folder).close()  # says so where there is none
    versions = Registry(registry)
    options = WorkerOptions(
        model=model,
        lineage=target_lineage,
        traffic=str(traffic_folder),
        registry=str(registry),
        routes=(route,),
        loss=None if loss == "auto" else loss,
        round_tokens=round_tokens,
        threads=threads or None,
    )
    if minutes is not None:
        options = msgspec.structs.replace(options, first_tokens=1, epochs=1e9)  # on what there is, as long as asked for
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    began, published, tokens, said = time.monotonic(), [], 0, ""
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("starting", total=None if minutes is None else minutes * 60)

        def show(told: Report) -> None:
            nonlocal tokens, said
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


@drafter_app.command("eval")
def evaluate_head(
    registry: Folder,
    head: Annotated[str, typer.Argument(metavar="VERSION|FOLDER", help="Number of a version, or folder of a head.")],
    traffic_folder: Traffic,
    model: Model = "default",
    target_lineage: Lineage = "",
    route: TrainedRoute = "",
    texts: Annotated[int, typer.Option(min=1, help="How many, the latest ones.")] = 200,
    depth: Annotated[int, typer.Option(min=1, max=15, help="Draft tokens in a row.")] = 3,
    everything: Annotated[bool, typer.Option("--all", help="Also texts that training may have seen.")] = False,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Score a head as the gate does, on kept traffic that training does not see, against the live version."""
    import torch

    from slipstream.drafter.training.course import WorkerOptions
    from slipstream.drafter.training.evaluate import evaluate

    if route:
        check_route(route, "route")
    if threads:
        torch.set_num_threads(threads)
    options = WorkerOptions(
        model=model,
        lineage=target_lineage,
        traffic=str(traffic_folder),
        registry=str(registry),
        routes=(route,),
        gate_texts=texts,
        depth=depth,
    )
    if head.isdecimal():
        found = evaluate(int(head), options, open_registry(registry), everything)
    else:
        opened = None
        with suppress(ModelError):  # a folder can be scored without a registry
            opened = open_registry(registry)
        found = evaluate(Path(head), options, opened, everything)
    if as_json:
        return print_json(found)
    verdict = found.verdict
    live = "no drafter" if found.live is None else f"version {found.live} (live)"
    table = Table("accept length with", cell(head), live, box=box.SIMPLE)
    for count, (ours, theirs) in enumerate(zip(found.accept_lengths, found.live_accept_lengths, strict=True), 1):
        table.add_row(f"{count} draft token{'s' if count > 1 else ''}", f"{ours:.3f}", f"{theirs:.3f}")
    show_table(table)
    what = "passes the gate" if verdict.passes else "does not pass the gate"
    print(f"{what}: at least {verdict.least_ratio:.3f} times the live one with 97.5 %; {verdict.describe()}")


def report(version: Version, what: str, as_json: bool) -> None:
    if as_json:
        return print_json(version)
    on = f" on route {version.route}" if version.route else ""
    print(f"version {version.version} {what}{on}")


def print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def show_table(table: Table) -> None:
    # In a pipe nothing is cut off: it is read by programs.
    console = Console()
    console.print(table) if console.is_terminal else Console(width=10_000).print(table)


def numbers(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{cell(name)} {value:.4g}" for name, value in scores.items())


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def cell(text: str) -> str:
    """A text for a cell of a table: manifests and reasons of strangers are neither markup nor terminal codes."""
    return escape(printable(text))
