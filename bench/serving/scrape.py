"""How long `GET /metrics` takes on vLLM's own server and on ours, idle and busy.

python -m bench.serving.scrape [--scrapes 200] [--streams 8]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench.serving.load import StockServer
from tokenprune.demo import builtin
from tokenprune.demo.local_server import LocalServer

MODEL = "bench"
PAUSE_SECONDS = 0.05
# cuts every 16 tokens, so that the figures change all the time
PRUNED = {"kv": {"method": "lagkv", "sink": 4, "lag": 16, "keep_ratio": 0.25}}


@contextmanager
def load(url: str, streams: int, fields: dict[str, Any]) -> Iterator[None]:
    """Keep `streams` requests running inside the `with` block."""
    stop = Event()
    body = {"model": MODEL, "prompt": "one two three", "max_tokens": 300, "ignore_eos": True}

    def ask() -> None:
        while not stop.is_set():
            answer = httpx.post(f"{url}/v1/completions", json=body | fields, timeout=120)
            answer.raise_for_status()

    with ThreadPoolExecutor(max(1, streams)) as pool:
        running = [pool.submit(ask) for _ in range(streams)]
        try:
            yield
        finally:
            stop.set()
        for future in running:
            future.result()


def scrape(url: str, count: int) -> list[float]:
    """Return the milliseconds of `count` scrapes, each on a connection that is open already."""
    times = []
    with httpx.Client(timeout=60) as client:
        client.get(f"{url}/metrics").raise_for_status()
        for _ in range(count):
            start = time.perf_counter()
            client.get(f"{url}/metrics").raise_for_status()
            times.append(1000 * (time.perf_counter() - start))
            time.sleep(PAUSE_SECONDS)
    return times


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--scrapes", type=int, default=200, help="per row of the table")
    parser.add_argument("--streams", type=int, default=8, help="requests at once while busy")
    options = parser.parse_args()
    model = builtin.model_folder()
    flags = [part for flag in builtin.serve_flags().items() for part in flag if part is not None]
    flags += ["--served-model-name", MODEL]
    table = Table("server", "load", "p50 ms", "p95 ms", "max ms")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        kinds: dict[str, LocalServer] = {
            "vllm": StockServer(model, flags, log, is_cpu=True),
            "tokenprune": LocalServer(model, flags, log),
        }
        for name, server in kinds.items():
            loads: dict[str, tuple[int, dict[str, Any]]] = {
                "idle": (0, {}),
                "busy": (options.streams, {}),
            }
            if name == "tokenprune":
                loads["busy, pruned"] = (options.streams, {"pruning": PRUNED})
            with server:
                server.wait_until_ready()
                for title, (streams, fields) in loads.items():
                    with load(server.url, streams, fields):
                        times = scrape(server.url, options.scrapes)
                    points = statistics.quantiles(times, n=20)
                    row = (statistics.median(times), points[-1], max(times))
                    table.add_row(name, title, *(f"{value:.1f}" for value in row))
    Console().print(table)


if __name__ == "__main__":
    main()
