"""``slipstream keys``: makes keys for --keys-file, and digests of keys."""

from __future__ import annotations

import os
import re
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from slipstream.engine.errors import ConfigError
from slipstream.server.access.keys import NAME, digest, parse
from slipstream.server.access.principal import RequestLimits

PREFIX = "sk-slipstream-"
app = typer.Typer(help="Keys for --keys-file: make them, and digests of them.", no_args_is_help=True)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is; keys of one name share limits and tenants.")],
    file: Annotated[
        Path | None,
        typer.Option(help="Add it to this file, which is made if it is missing.", envvar="SLIPSTREAM_KEYS_FILE"),
    ] = None,
    role: Annotated[str, typer.Option(help="user, or admin for what controls the server.")] = "user",
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens of prompts and answers.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Sequences that run or wait.")] = None,
    weight: Annotated[float | None, typer.Option(help="Share of the machine while others want it, too.")] = None,
    most_urgent_priority: Annotated[int | None, typer.Option(help="Lowest priority that requests may have.")] = None,
    max_n: Annotated[int | None, typer.Option(help="Most choices per prompt.")] = None,
) -> None:
    """Make a key. It is shown once; the file has its digest."""
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{name!r}: a name has at most 64 letters, digits and ._-")
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "weight": weight,
        "most_urgent_priority": most_urgent_priority,
        "max_n": max_n,
    }
    secret = PREFIX + secrets.token_urlsafe(32)
    fields = {"name": f'"{name}"', "hash": f'"sha256:{digest(secret.encode()).hex()}"'}
    fields |= {"role": f'"{role}"'} if role != "user" else {}
    fields |= {key: str(value) for key, value in limits.items() if value is not None}
    entry = "[[key]]\n" + "".join(f"{key} = {value}\n" for key, value in fields.items())
    if file is None:
        print(entry)
    else:
        add(file, entry)
    print(secret)


@app.command("hash")
def hash_key() -> None:
    """Read a key from the standard input and print what stands for it in a file or an option."""
    secret = sys.stdin.readline().strip()
    if not secret:
        raise ConfigError("there is no key on the standard input")
    print(f"sha256:{digest(secret.encode()).hex()}")


def add(file: Path, entry: str) -> None:
    """A server that reads the file meanwhile sees it before or after, as a whole. Raises ConfigError."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = before + ("\n" if before and not before.endswith("\n\n") else "") + entry
    parse(whole, file, RequestLimits())
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    descriptor, name = tempfile.mkstemp(dir=file.resolve().parent, prefix=f".{file.name}.")
    fresh = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(whole)
        fresh.chmod(mode)
        fresh.replace(file.resolve())
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
