"""What the demo does one after the other: steps with a clock, and a server that is watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokenprune.demo.local_server import LocalServer
from tokenprune.errors import TokenPruneError


@contextmanager
def step(console: Console, label: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show `label` with a clock while the body runs, and a bar where `total` is known."""
    started = time.monotonic()
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    if total is not None:
        columns[2:2] = [BarColumn(30), TextColumn("{task.completed}/{task.total}")]
    is_live = console.is_terminal
    if not is_live:
        console.print(f"{label} ...")
    # a fast clock would take time from the engine on a small machine
    progress = Progress(
        *columns, console=console, transient=True, refresh_per_second=4, disable=not is_live
    )
    with progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)
    if is_live:
        console.print(f"{label}: {time.monotonic() - started:.0f} s")


@contextmanager
def served(
    console: Console, model: Path | None, arguments: Sequence[str], log: Path
) -> Iterator[LocalServer]:
    """Serve while the body runs; where it fails, show the end of the server's log.

    Args:
        console: Where to say what happens.
        model: Checkpoint; None for the built-in model.
        arguments: The other arguments of `tokenprune serve`.
        log: File for everything the server prints.

    Raises:
        TokenPruneError: The server did not start, did not answer or did not prune as asked.
    """
    from openai import OpenAIError

    with LocalServer(model, arguments, log) as server:
        try:
            with step(console, "Starting tokenprune serve (up to a minute or two)"):
                server.wait_until_ready()
            yield server
        except (TokenPruneError, OpenAIError, OSError) as error:
            tail = f"\n{server.log_tail()}\n\nWhole log: {server.log}"
            console.print(tail, markup=False, soft_wrap=True)
            if isinstance(error, TokenPruneError):
                raise
            raise TokenPruneError(
                f"the server must answer, got {error!r}; its log is above"
            ) from error
        with step(console, "Stopping the server"):
            server.stop()
