"""The server that `bench.load` hurts: a tiny model, a tiny pool, and what its processes hold."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.common import write_whole
from bench.load.bodies import BOUNDARIES, MODEL
from bench.serving.load import StockServer
from tokenprune.demo.checkpoint import build_checkpoint
from tokenprune.demo.local_server import LocalServer

MAX_MODEL_LEN = 1024
# a pool of 4096 tokens preempts with 16 requests of some hundred; three pictures fill the cache of
# encoder outputs
ARGUMENTS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager", "--seed", "0"),
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "512"),
    *("--max-num-seqs", "16", "--limit-mm-per-prompt", '{"image": 3}'),
    *("--kv-cache-memory-bytes", "16M", "--block-size", "32", "--scheduling-policy", "priority"),
)
OURS = (
    *("--prune-layers", ",".join(map(str, BOUNDARIES[1:])), "--allow-channel-pruning"),
    "--require-pruning",
)


@dataclass(frozen=True)
class Holding:
    """What one process holds.

    Attributes:
        name: Its part in the server.
        pid: Its id.
        rss_mb: Resident memory.
        handles: Open files, sockets among them.
    """

    name: str
    pid: int
    rss_mb: float
    handles: int


def make_server(folder: Path, *, stock: bool = False, extra: Sequence[str] = ()) -> LocalServer:
    """Return a server that is yet to be started; a `stock` one is vLLM's own."""
    checkpoint = build_checkpoint(folder / "checkpoint")
    log = folder / "server.log"
    if stock:
        return StockServer(checkpoint, [*ARGUMENTS, *extra], log, is_cpu=True)
    return LocalServer(checkpoint, [*ARGUMENTS, *OURS, *extra], log)


def holdings(server: LocalServer) -> list[Holding]:
    """Return what the processes of a running server hold, the API process first."""
    root = psutil.Process(server.pid)
    found = []
    for process in (root, *root.children(recursive=True)):
        words = process.cmdline()
        title = next((word for word in words if word.startswith("VLLM::")), "")
        if process == root or title:
            name = title.removeprefix("VLLM::").partition("_")[0] or "API"
            held = process.memory_info().rss / 2**20
            found.append(Holding(name, process.pid, round(held, 1), process.num_fds()))
    return found


def check_idle(server: LocalServer, pids: Sequence[int]) -> str | None:
    """Return what is wrong with a server that should be healthy and idle, or None."""
    if [h.pid for h in holdings(server)] != list(pids):
        return "a process ended"
    # the last answers' blocks go with the step after them
    for _ in range(100):
        samples = server.metrics()
        busy = {
            name: value
            for (name, _), value in samples.items()
            if name
            in (
                "vllm:num_requests_running",
                "vllm:num_requests_waiting",
                "vllm:kv_cache_usage_perc",
                "tokenprune_kv_bytes_saved",
            )
            and value
        }
        if not busy:
            return None
        time.sleep(0.1)
    return f"not idle: {busy}"


class BatchLog:
    """A file with a line for each batch, so that a run which was ended goes on where it stopped.

    Args:
        path: The file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = path.read_text().splitlines() if path.exists() else []

    @property
    def num_batches(self) -> int:
        """Batches that are done."""
        return len(self._lines)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write what came of one more batch."""
        self._lines.append(json.dumps(line))
        write_whole(self._path, "\n".join(self._lines) + "\n")


def show_trouble(server: LocalServer, wrong: Sequence[Any], state: str | None) -> None:
    """Print what the server's log says of wrong answers, and of a state that must not be."""
    if wrong:
        _, mark, rest = server.log.read_text(errors="replace").rpartition("Traceback")
        print((mark + rest)[:8000], file=sys.stderr)
    if state is not None:
        print(server.log_tail(80), file=sys.stderr)
