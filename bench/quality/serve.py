"""One served engine for all questions that have no answer yet, and a bar that shows how far."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAIError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.common import manifest
from bench.quality.ask import MODEL, ask_all, engine_shape
from bench.quality.cells import Cell
from bench.quality.store import Answers
from bench.tasks.held_out import Item
from tokenprune.demo.local_server import LocalServer
from tokenprune.errors import TokenPruneError

_SERVER_ARGUMENTS = (
    *("--enforce-eager", "--no-enable-prefix-caching", "--allow-channel-pruning"),
    # small enough that a picture prompt fills some that can be packed
    *("--block-size", "32"),
    *("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(512 << 20)),
    *("--limit-mm-per-prompt", '{"image": 2}'),
)

Work = Sequence[tuple[Cell, Item]]


def server_arguments(folder: Path, extra: Sequence[str]) -> list[str]:
    """Return what `tokenprune serve` gets besides the model; later words win."""
    import torch

    config = json.loads((folder / "config.json").read_text())
    longest = str(config.get("text_config", config)["max_position_embeddings"])
    # many CPUs have no fast bfloat16, and GPU attention kernels have no float32
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    # transprune scores a prompt in one step, so a step must hold any prompt
    lengths = ("--max-model-len", longest, "--max-num-batched-tokens", longest)
    return [*_SERVER_ARGUMENTS, *lengths, "--dtype", dtype, *extra]


def ask_server(
    model: Path,
    arguments: Sequence[str],
    work: Work,
    answers: Answers,
    *,
    seed: int,
    concurrency: int,
    console: Console,
) -> None:
    """Serve the model, ask all of `work`, and stop the server, whatever happened.

    Raises:
        TokenPruneError: It did not start, did not answer or did not prune as asked.
    """
    with tempfile.TemporaryDirectory() as scratch:
        named = [*arguments, "--served-model-name", MODEL]
        with LocalServer(model, named, Path(scratch, "server.log")) as server:
            try:
                console.print("Starting tokenprune serve (up to a minute or two) ...")
                server.wait_until_ready()
                engine = engine_shape(server)
                run = manifest("bench.quality", seed)
                answers.start_run({**run, "engine": engine, "concurrency": concurrency})
                with bar(console, "served", len(work)) as advance:
                    ask_all(server, engine, work, answers, concurrency, advance)
            except (TokenPruneError, OpenAIError, OSError) as error:
                console.print(server.log_tail(), markup=False, soft_wrap=True)
                raise TokenPruneError(f"the server must answer, got: {error}") from error


@contextmanager
def bar(console: Console, label: str, total: int) -> Iterator[Callable[[Cell], None]]:
    """Show a progress bar that names the cell at work while the body runs."""
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    # a fast clock would take time from the engine on a small machine
    with Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=2) as shown:
        task = shown.add_task(label, total=total)

        def advance(cell: Cell) -> None:
            where = f"{label}: {cell.task} {cell.method} {cell.keep_ratio:g}"
            shown.update(task, advance=1, description=where)

        yield advance
