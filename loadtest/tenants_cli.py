"""``slipstream bench tenants``: its options. What it does is in tenants.py."""

from __future__ import annotations

from typing import Annotated

import typer

from slipstream.loadtest.options import Dataset, Extra, Model, Seed, Timeout, Url, need_aiohttp, server_options, start


def tenants(
    flood_key: Annotated[str, typer.Option(help="Key of the tenant that floods.")],
    quiet_key: Annotated[list[str], typer.Option(help="Key of a quiet tenant; repeat for each.")],
    url: Url = "http://127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(min=1, help="How long all come together.")] = 1800.0,
    alone_seconds: Annotated[float, typer.Option(min=1, help="How long the quiet tenants are alone before.")] = 120.0,
    peak_seconds: Annotated[float, typer.Option(min=1, help="How long the peak is looked for.")] = 60.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Streams that look for it.")] = 64,
    overload: Annotated[float, typer.Option(help="What comes, as a multiple of what the server can do.")] = 1.5,
    quiet_share: Annotated[float, typer.Option(help="What each quiet tenant asks for, as a share of that.")] = 0.05,
    abort_share: Annotated[float, typer.Option(min=0, max=1, help="Share of clients that go away.")] = 0.1,
    slow_share: Annotated[float, typer.Option(min=0, max=1, help="Share of clients that read slowly.")] = 0.1,
    max_output_tokens: Annotated[int, typer.Option(min=1, help="Output lengths are random up to this.")] = 64,
    settle: Annotated[float, typer.Option(help="Seconds the server may take to become idle at the end.")] = 60.0,
    pid: Annotated[int | None, typer.Option(help="Server process whose memory is watched.")] = None,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    extra: Extra = "{}",
    timeout: Timeout = 600.0,
) -> None:
    """One tenant floods, others are quiet: goodput, what the quiet ones notice, refusals, memory, what is left over."""
    need_aiohttp()
    from slipstream.loadtest.commands import run_tenants
    from slipstream.loadtest.tenants import TenantsOptions

    start(
        lambda: run_tenants(
            server_options(url, model, flood_key, extra, timeout),
            [server_options(url, model, key, extra, timeout) for key in quiet_key],
            TenantsOptions(
                seconds=seconds,
                alone_seconds=alone_seconds,
                peak_seconds=peak_seconds,
                concurrency=concurrency,
                overload=overload,
                quiet_share=quiet_share,
                abort_share=abort_share,
                slow_share=slow_share,
                max_output_tokens=max_output_tokens,
                settle=settle,
                pid=pid,
                seed=seed,
                dataset=dataset,
            ),
        )
    )
