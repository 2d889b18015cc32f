"""``slipstream bench rollout``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slipstream.loadtest.options import ApiKey, Dataset, Extra, Seed, Timeout, need_aiohttp, server_options, start


def rollout(
    server: Annotated[
        list[str],
        typer.Option(
            "--server", help="NAME=URL of a server; twice or more. What is faster is said against the others."
        ),
    ],
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a batch.")] = 12,
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="Batches of the same prompts, with other samples.")] = 3,
    temperature: Annotated[float, typer.Option(help="Of all answers.")] = 1.0,
    median_tokens: Annotated[int, typer.Option(min=1, help="Median length of the answers.")] = 48,
    tail: Annotated[float, typer.Option(min=1, help="The longest 5 % have at least this many times the median.")] = 8.0,
    longest: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1000,
    natural: Annotated[
        bool, typer.Option("--natural", help="Answers may end before their lengths, where the model ends them.")
    ] = False,
    pause: Annotated[float, typer.Option(min=0, help="Seconds between epochs, for servers that learn while idle.")] = 0,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Stop (SIGSTOP) each server in the turns of others: it may train then.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="SVG or PNG file: running requests over time.")] = None,
    seed: Seed = 0,
    dataset: Dataset = None,
    api_key: ApiKey = None,
    extra: Extra = "{}",
    timeout: Timeout = 3600.0,
) -> None:
    """Batches of sampled answers with a long tail, as trainers by reinforcement ask for them; servers in turns."""
    need_aiohttp()
    from slipstream.loadtest.commands import run_rollout
    from slipstream.loadtest.rollout import RolloutOptions

    named = dict(name_and_url(text) for text in server)
    if len(named) < len(server):
        raise typer.BadParameter("--server: every server needs a name of its own")
    start(
        lambda: run_rollout(
            {name: server_options(url, None, api_key, extra, timeout) for name, url in named.items()},
            RolloutOptions(
                prompts=prompts,
                samples=samples,
                epochs=epochs,
                temperature=temperature,
                median_tokens=median_tokens,
                tail=tail,
                longest=longest,
                natural=natural,
                pause=pause,
                freeze=freeze,
                seed=seed,
                dataset=dataset,
                plot=plot,
            ),
        )
    )


def name_and_url(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not name or not url:
        raise typer.BadParameter(f"--server takes NAME=URL, for example plain=http://127.0.0.1:8001, not {text!r}")
    return name, url
