"""Tables for people on the terminal. The library that draws them is slow to import: servers do without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slipstream.server.telemetry.log import printable

if TYPE_CHECKING:
    from rich.table import Table


def new_table(*columns: str, **options: Any) -> Table:
    """``columns`` are markup, as ``cell`` makes it; ``options`` those of the library's ``Table``."""
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE, **options)


def show_table(table: Table) -> None:
    """In a pipe nothing is cut off: it is read by programs."""
    from rich.console import Console

    console = Console()
    console.print(table) if console.is_terminal else Console(width=10_000).print(table)


def cell(text: str) -> str:
    """A text for a cell of a table: manifests and reasons of strangers are neither markup nor terminal codes."""
    from rich.markup import escape

    return escape(printable(text))
