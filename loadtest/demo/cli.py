"""``slipstream demo``."""

from __future__ import annotations

import asyncio
import signal
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from slipstream.loadtest.options import Dataset, Seed, need_aiohttp, start

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="How long it may take in all.")] = 30.0,
    workload: Annotated[str, typer.Option(help="sharegpt (chat) or extract (one application).")] = "sharegpt",
    folder: Annotated[
        Path | None, typer.Option(help="Keeps the drafter registry, the traffic and the server's log here.")
    ] = None,
    plot: Annotated[
        Path, typer.Option(help="SVG or PNG file for accept length and tokens per second over time.")
    ] = Path("demo.svg"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the server, on 127.0.0.1; 0 takes a free one.")] = 0,
    model: Annotated[str, typer.Option(help="Hugging Face folder, GGUF file, or 'default'.")] = "default",
    drafter: Annotated[
        str, typer.Option(help="Where learning begins: cold, warm (the default model's head), or a head's folder.")
    ] = "cold",
    evolve: Annotated[str, typer.Option(help="Train in idle time only (idle) or always.")] = "idle",
    streams: Annotated[int, typer.Option(min=1, help="Of the traffic to learn from.")] = 32,
    output_tokens: Annotated[int, typer.Option(min=16, help="max_tokens of each request.")] = 128,
    seed: Seed = 0,
    dataset: Dataset = None,
) -> None:
    """Watch a server learn: starts one, by default with a cold drafter, replays prompts, measures before and after."""
    need_aiohttp()
    from slipstream.loadtest.children import free_port
    from slipstream.loadtest.demo.plan import DemoOptions

    with ExitStack() as stack:
        kept = folder or Path(stack.enter_context(TemporaryDirectory(prefix="slipstream-demo-")))
        kept.mkdir(parents=True, exist_ok=True)
        start(
            lambda: _run(
                DemoOptions(
                    minutes=minutes,
                    workload=workload,  # type: ignore[arg-type]  # checked by DemoOptions
                    folder=kept,
                    plot=plot,
                    port=port or free_port(),
                    model=model,
                    drafter=drafter,
                    evolve=evolve,  # type: ignore[arg-type]
                    streams=streams,
                    output_tokens=output_tokens,
                    seed=seed,
                    dataset=dataset,
                )
            )
        )


async def _run(options: Any) -> int:
    from rich.console import Console

    from slipstream.loadtest.demo.demo import Demo
    from slipstream.loadtest.demo.result import plot_result, print_result
    from slipstream.loadtest.report import print_json

    working = asyncio.current_task()
    assert working is not None
    received: list[int] = []

    def on_signal(number: int) -> None:
        if not received:  # once: a second cancellation would break off the clean end
            received.append(number)
            working.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    try:
        result = await Demo(options, Console(stderr=True)).run()
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]
    print_result(result, Console())
    plot_result(result)
    print(f"plot: {options.plot}")
    print_json(result.fields())
    return 0 if result.ok else 1
