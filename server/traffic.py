"""What a request says about being kept, and the commands that look at what was kept and delete it."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from starlette.requests import Request

from slipstream.drafter.evolution.index import TrafficIndex
from slipstream.engine.messages import TrafficLevel
from slipstream.server.errors import InvalidRequestError

LEVELS: tuple[TrafficLevel, ...] = ("off", "tokens", "features")
LEVEL_HEADER = "X-Slipstream-Traffic"
DOMAIN_HEADER = "X-Slipstream-Domain"


def traffic_level(request: Request, most: TrafficLevel) -> TrafficLevel:
    """What may be kept of a request: what the server keeps, or less if the request says so.

    Raises InvalidRequestError for a header that means nothing.
    """
    asked = request.headers.get(LEVEL_HEADER)
    if asked is None:
        return most
    for level in LEVELS:
        if asked.strip().lower() == level:
            return min(level, most, key=LEVELS.index)
    raise InvalidRequestError(f"{LEVEL_HEADER}: {asked[:60]!r} is none of {', '.join(LEVELS)}", param=LEVEL_HEADER)


def traffic_domain(request: Request) -> str:
    """What a request is about, in its sender's words; raises InvalidRequestError for what is no name."""
    domain = request.headers.get(DOMAIN_HEADER, "").strip()
    if domain and not re.fullmatch(r"[\w.:/-]{1,64}", domain, re.ASCII):
        raise InvalidRequestError(
            f"{DOMAIN_HEADER}: at most 64 letters, digits and ._-:/, not {domain[:60]!r}", param=DOMAIN_HEADER
        )
    return domain


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
    table = Table("tenant", title=f"Traffic in {folder}")
    for name in ("samples", "tokens", "bytes", "oldest", "newest"):
        table.add_column(name, justify="right")
    for tenant, entry in found.items():
        times = (datetime.fromtimestamp(when).isoformat(" ", "seconds") for when in (entry.oldest, entry.newest))
        table.add_row(tenant or "(none)", f"{entry.samples:,}", f"{entry.tokens:,}", f"{entry.bytes:,}", *times)
    Console().print(table)


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
