"""The commands that look at what was kept of the traffic, and delete it."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from typing import Annotated

import typer

from slipstream.drafter.traffic.index import TrafficIndex
from slipstream.server.commands.tables import cell, new_table, show_table

app = typer.Typer(help="What was kept of the traffic: look at it, delete it.", no_args_is_help=True)
Folder = Annotated[str, typer.Option(help="The --traffic-folder of the server.", envvar="SLIPSTREAM_TRAFFIC_FOLDER")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def stats(folder: Folder, as_json: AsJson = False) -> None:
    """Samples, tokens and bytes of each tenant."""
    index = TrafficIndex(folder)
    found = index.statistics()
    index.close()
    if as_json:
        print(json.dumps({tenant: dataclasses.asdict(entry) for tenant, entry in found.items()}))
        return
    table = new_table("tenant", title=cell(f"Traffic in {folder}"))
    for name in ("samples", "tokens", "bytes", "oldest", "newest"):
        table.add_column(name, justify="right")
    for tenant, entry in found.items():
        times = (datetime.fromtimestamp(when).isoformat(" ", "seconds") for when in (entry.oldest, entry.newest))
        name = cell(tenant) or "(none)"
        table.add_row(name, f"{entry.samples:,}", f"{entry.tokens:,}", f"{entry.bytes:,}", *times)
    show_table(table)


@app.command()
def purge(
    folder: Folder,
    tenant: Annotated[str | None, typer.Option(help="Whose; '' is who sent no name.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Of all tenants.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete everything kept of a tenant, also what a running server has yet to write."""
    if (tenant is None) != everything:
        raise typer.BadParameter("give either --tenant or --all")
    index = TrafficIndex(folder)
    count = index.purge(tenant)
    index.close()
    print(json.dumps({"purged_samples": count}) if as_json else f"deleted {count} samples")
