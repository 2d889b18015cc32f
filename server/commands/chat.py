"""``slipstream chat``: its options. What it does is in clients/terminal.py."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from slipstream.engine.errors import SlipstreamError


def chat(
    url: Annotated[str, typer.Option(help="Root of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model to ask for; default the server's first.")] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[float | None, typer.Option(help="Default: the server's.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    api_key: Annotated[str | None, typer.Option(envvar="SLIPSTREAM_API_KEY", help="Sent as bearer token.")] = None,
) -> None:
    """Talk to a server in the terminal; lines from a pipe are questions, too."""
    from slipstream.clients.errors import ClientError  # the others of these are slow to import, and only needed here
    from slipstream.clients.terminal import talk

    fields: dict[str, Any] = {"max_tokens": max_tokens}
    if temperature is not None:
        fields["temperature"] = temperature
    try:
        raise typer.Exit(talk(url, api_key, model, system, fields))
    except ClientError as error:
        raise SlipstreamError(f"{error}; 'slipstream serve' starts a server, --url names another one") from None
