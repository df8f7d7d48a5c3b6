"""A bar for what takes long, on a terminal; nothing elsewhere, and nothing for what is done at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]

_PATIENCE = 1.0  # seconds


@contextmanager
def bar(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """A function to call, with a word about where one is, after each of ``total`` parts of a long piece of work."""
    from rich.console import Console  # rich is imported where it is needed
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda word: None
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    bars, began = Progress(*columns, console=console, transient=True), time.monotonic()
    task = bars.add_task("", total=total)

    def advance(word: str) -> None:
        bars.update(task, advance=1, description=word)
        if not bars.live.is_started and time.monotonic() - began > _PATIENCE:
            bars.start()

    try:
        yield advance
    finally:
        if bars.live.is_started:
            bars.stop()
