"""The server that `bench.load` hurts: a tiny model, a tiny pool, and what its processes hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

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
