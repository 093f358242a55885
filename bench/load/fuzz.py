"""Send drawn bodies to a running server, and count what comes back.

    python -m bench.load.fuzz [--bodies 10000] [--batch 250] [--seconds 420] [--seed 0] [--out FILE]

Bodies are drawn batch by batch from the seed, and a line of the result is written after each
batch, so a run that was ended goes on where it stopped. `--seconds` ends a run after its batch.
A batch is sent several at a time and every answer must come within the limit. After it the server
must be healthy and idle, with the processes that it started with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.common import manifest
from bench.load.bodies import draw_bodies
from bench.load.server import BatchLog, check_idle, holdings, make_server, show_trouble
from tokenprune.demo.local_server import LocalServer

RESULT = Path(__file__).resolve().parents[1] / "results" / "load" / "fuzz.jsonl"
CONCURRENCY = 12
LIMIT_SECONDS = 120.0
# of an error's text: what a client sent is repeated in part only
LONGEST_MESSAGE = 2000


@dataclass
class Outcomes:
    """What came back of some bodies.

    Attributes:
        counts: Answers by path and status.
        wrong: Bodies whose answer must not be, with what it was.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)


def send_all(url: str, drawn: Sequence[tuple[str, dict[str, Any]]]) -> Outcomes:
    """Send bodies, several at a time, and return what came back once all are answered."""
    return asyncio.run(_send_all(url, drawn))


async def _send_all(url: str, drawn: Sequence[tuple[str, dict[str, Any]]]) -> Outcomes:
    outcomes = Outcomes()
    waiting = iter(drawn)
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_SECONDS, trust_env=False) as client:

        async def work() -> None:
            for path, body in waiting:
                await _send(client, path, body, outcomes)

        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(work())
    return outcomes


async def _send(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], outcomes: Outcomes
) -> None:
    headers = {"content-type": "application/json"}
    try:
        response = await client.post(path, content=json.dumps(body), headers=headers)
    except httpx.HTTPError as error:
        outcomes.counts[f"{path} {type(error).__name__}"] += 1
        outcomes.wrong.append({"path": path, "body": body, "error": repr(error)})
        return
    outcomes.counts[f"{path} {response.status_code}"] += 1
    reason = _wrong(response)
    if reason is not None:
        outcomes.wrong.append(
            {"path": path, "body": body, "error": reason, "text": response.text[:500]}
        )


def _wrong(response: httpx.Response) -> str | None:
    """Return what is wrong with an answer, or None."""
    if response.status_code >= 500:
        return f"status {response.status_code}"
    if response.status_code >= 400:
        return "a long message" if len(response.text) > LONGEST_MESSAGE else None
    if '"error"' in response.text and "event-stream" in response.headers["content-type"]:
        return "an error inside a stream"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or go on with a run."""
    parser = argparse.ArgumentParser("bench.load.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    log = BatchLog(options.out)
    deadline = time.monotonic() + options.seconds
    with (
        tempfile.TemporaryDirectory() as folder,
        make_server(Path(folder)) as server,
    ):
        server.wait_until_ready()
        pids = [h.pid for h in holdings(server)]
        for number in range(log.num_batches, -(-options.bodies // options.batch)):
            if time.monotonic() > deadline:
                break
            started = time.monotonic()
            # Hypothesis draws from the whole range of a seed
            outcomes = send_all(
                server.url, draw_bodies(options.seed * 1_000_000 + number, options.batch)
            )
            state, held = check_idle(server, pids), holdings(server)
            line = {
                "batch": number,
                "bodies": options.batch,
                "seconds": round(time.monotonic() - started, 1),
                "counts": dict(sorted(outcomes.counts.items())),
                "wrong": outcomes.wrong,
                "state": state,
                "failures": _failures(server),
                "rss_mb": {h.name: h.rss_mb for h in held},
                "handles": {h.name: h.handles for h in held},
                **({"manifest": manifest("bench.load.fuzz", options.seed)} if not number else {}),
            }
            log.add(line)
            print(json.dumps({**line, "wrong": len(outcomes.wrong)}), flush=True)
            show_trouble(server, outcomes.wrong, state)
            if state is not None:
                return 1
    return 0


def _failures(server: LocalServer) -> float:
    """Return how many calls of a method failed since start."""
    samples = server.metrics().items()
    return sum(v for (name, _), v in samples if name == "tokenprune_policy_failures_total")


if __name__ == "__main__":
    sys.exit(main())
