"""A progress bar on stderr, only on a terminal: it redraws twice a second, for the servers need the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[bool], None]]:
    """Yields what to call at the end of each step with whether it went well."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed = 0
    with Progress(
        *columns, console=console, refresh_per_second=2, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(title, total=total)

        def advance(ok: bool) -> None:
            nonlocal failed
            failed += not ok
            progress.update(task, advance=1, description=f"{title}, {failed} failed" if failed else title)

        yield advance
