"""``slipstream drafter``: the versions of a drafter, their files and states. Works beside a running server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from slipstream.drafter.registry.registry import Registry, default_folder
from slipstream.drafter.registry.states import Version
from slipstream.kernels.stored import Quantize
from slipstream.server.commands.tables import cell, new_table, show_table
from slipstream.server.evolution.config import check_version_route

drafter_app = typer.Typer(
    help="List, compare, train, evaluate, promote, exchange and delete the versions of a drafter.",
    no_args_is_help=True,
)

Folder = Annotated[
    Path,
    typer.Option(
        "--registry",
        envvar="SLIPSTREAM_REGISTRY",
        help="Folder of the registry.",
        default_factory=default_folder,
        show_default="slipstream/drafters in $XDG_DATA_HOME or ~/.local/share",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Number = Annotated[int, typer.Argument(help="Number of the version.", metavar="VERSION")]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]
Route = Annotated[str, typer.Option(help="tenant:NAME, domain:NAME or lora:NAME; empty for the route all share.")]
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

Quantized = Annotated[Quantize, typer.Option(help="The --quantize of that server.", envvar="SLIPSTREAM_QUANTIZE")]


def open_registry(folder: Path) -> Registry:
    return Registry(folder, create=False)


@drafter_app.command("list")
def list_versions(
    registry: Folder,
    route: Annotated[str | None, typer.Option(help="Only of this route: tenant:NAME, say.")] = None,
    pruned: Annotated[bool, typer.Option("--pruned", help="Also those whose weights are deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """List versions, oldest first."""
    versions = open_registry(registry).list(route, pruned)
    if as_json:
        return print_json(versions)
    table = new_table("version", "route", "state", "from", "origin", "tokens", "gate", "serving", "made")
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
    table = new_table(show_header=False)
    for name, value in (fields | {"serving": found.metrics}).items():
        shown = ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, dict) else value
        table.add_row(name, cell(str(shown)))
    show_table(table)
    events = new_table("time", "what", "from", "to", "reason")
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
    table = new_table("", f"version {a}", f"version {b}", "change")
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
    quantize: Quantized = "none",
    route: Route = "",
    note: Annotated[str, typer.Option(help="Kept in the manifest.")] = "",
    as_json: AsJson = False,
) -> None:
    """Add a head from elsewhere as a candidate."""
    from slipstream.drafter.registry.exchange import import_head
    from slipstream.engine.checkpoint import open_checkpoint

    check_version_route(route, "route")
    checkpoint = open_checkpoint(target)
    known = {"lineage": target_lineage, "quantize": quantize}
    added = import_head(Registry(registry), folder, checkpoint, **known, route=route, note=note)
    report(added, "is a candidate", as_json)


@drafter_app.command()
def prune(
    registry: Folder,
    keep: Annotated[int, typer.Option(min=0, help="How many to keep per route.")],
    route: Annotated[str | None, typer.Option(help="Only of this route: tenant:NAME, say.")] = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Delete the weights of old versions; live, canary and pinned ones stay, and what a rollback needs."""
    pruned = open_registry(registry).prune(keep, route, reason or "by hand")
    if as_json:
        return print_json(pruned)
    print(f"pruned: {', '.join(map(str, pruned))}" if pruned else "nothing to prune")


def report(version: Version, what: str, as_json: bool) -> None:
    if as_json:
        return print_json(version)
    on = f" on route {version.route}" if version.route else ""
    print(f"version {version.version} {what}{on}")


def print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def numbers(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{cell(name)} {value:.4g}" for name, value in scores.items())


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
