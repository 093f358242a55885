"""Thousands of mixed requests, and whether everything is back where it was afterwards.

    python -m bench.load.run [--requests 10000] [--batch 500] [--seconds 420] [--seed 0]
        [--method mixed] [--concurrency 48] [--out FILE]

`mixed` draws methods of all axes, pictures, lengths, streams, `n`, priorities, and clients that
leave at every stage; a method's name asks for that one, `off` for none, and `stock` asks vLLM's
own server. The pool of the server (`bench/load/server.py`) is so small that requests preempt each
other, and its encoder cache holds three pictures.

One request in eight is one of a few that were answered alone first: its text must be the same. A
line of the result is written after each batch, and a run that was ended goes on where it stopped,
on a fresh server: memory is then compared within one part, whose first batch has `started` set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from bench.common import manifest
from bench.load.bodies import MODEL, picture
from bench.load.server import BatchLog, check_idle, holdings, make_server, show_trouble

RESULTS = Path(__file__).resolve().parents[1] / "results" / "load"
LIMIT_SECONDS = 180.0
NUM_SAMPLES = 16
METHODS: dict[str, dict[str, Any]] = {
    "transprune": {"visual": {"method": "transprune", "keep_ratio": 0.25}},
    "uniform": {"visual": {"method": "uniform", "keep_ratio": 0.25}},
    "random": {"visual": {"method": "random", "keep_ratio": 0.25}},
    "vflowopt": {"visual": {"method": "vflowopt", "keep_ratio": 0.25}},
    "lagkv": {"kv": {"method": "lagkv", "sink": 4, "lag": 16, "keep_ratio": 0.25}},
    "streaming": {"kv": {"method": "streaming", "sink": 4, "lag": 32, "keep_ratio": 0.25}},
    "random-kv": {"kv": {"method": "random", "sink": 4, "lag": 16, "keep_ratio": 0.5}},
    "think": {"channels": {"method": "think", "keep_ratio": 0.5, "window": 8, "recent": 8}},
}
PLAIN = ("off", "stock")


def request(rng: random.Random, method: str) -> dict[str, Any]:
    """Return a body that gives the same answer whenever it is asked."""
    pictures = [picture(rng.randrange(12)) for _ in range(rng.choice((0, 1, 1, 2)))]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    words = rng.choice((2, 10, 60, 150 if len(pictures) < 2 else 40))
    text = " ".join(str(rng.randrange(1000)) for _ in range(words))
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "temperature": 0,
        "max_tokens": rng.choice((1, 4, 12, 30, 60)),
        "ignore_eos": True,
    }
    if method == "mixed":
        kinds = [rng.choice(sorted(METHODS)) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
        body["pruning"] = {k: v for kind in kinds for k, v in METHODS[kind].items()}
    elif method not in PLAIN:
        body["pruning"] = METHODS[method]
    return body


class Load:
    """Sends requests and counts what comes back.

    Attributes:
        counts: Requests by how they ended.
        wrong: What must not be.
    """

    def __init__(self, url: str, method: str) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._url = url
        self._method = method
        rng = random.Random(f"samples/{method}")
        self._samples = [request(rng, method) for _ in range(NUM_SAMPLES)]
        self._alone: list[str] = []

    async def run(self, seed: str, count: int, concurrency: int) -> None:
        """Send `count` requests, `concurrency` at a time."""
        rng = random.Random(seed)
        client = httpx.AsyncClient(base_url=self._url, timeout=LIMIT_SECONDS, trust_env=False)
        async with client:
            if not self._alone:
                self._alone = [await self._text(client, body) for body in self._samples]
            work = iter(range(count))
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work(client, work, rng))

    async def _work(
        self, client: httpx.AsyncClient, work: Iterator[int], rng: random.Random
    ) -> None:
        for _ in work:
            try:
                await self._one(client, rng)
            except httpx.HTTPError as error:
                self._note("error", repr(error))

    async def _one(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        if rng.randrange(8) == 0:
            number = rng.randrange(NUM_SAMPLES)
            text = await self._text(client, self._samples[number])
            is_same = text == self._alone[number]
            self.counts["sample, the same" if is_same else "sample, another text"] += 1
            return
        body = request(rng, self._method) | {"priority": rng.randrange(-2, 3)}
        stage = rng.choice(("whole",) * 4 + ("stream",) * 2 + ("n", "at once", "soon", "midway"))
        if stage == "n":
            body |= {"n": 3, "temperature": 1}
        if stage in ("whole", "n"):
            response = await client.post("/v1/chat/completions", json=body)
            self._note(f"{stage} {response.status_code}", _wrong(response))
        elif stage == "at once":
            # before anything can have come back
            with_limit = client.post(
                "/v1/chat/completions", json=body, timeout=rng.uniform(0.001, 0.2)
            )
            try:
                await with_limit
            except httpx.TimeoutException:
                self.counts["left before the answer"] += 1
            else:
                self.counts["whole 200"] += 1
        else:
            await self._stream(client, body, {"soon": 1, "midway": 6}.get(stage))

    async def _stream(
        self, client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None
    ) -> None:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        events = 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                events += line.startswith("data: ")
                if '"error"' in line and response.status_code == 200:
                    self._note("error in a stream", line[:300])
                if leave_after is not None and events > leave_after:
                    self.counts["left a stream"] += 1
                    return
        self._note(f"stream {response.status_code}", None)

    async def _text(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            self._note(f"sample {response.status_code}", response.text[:300])
            return ""
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    def _note(self, what: str, wrong: str | None) -> None:
        self.counts[what] += 1
        if wrong is not None:
            self.wrong.append(f"{what}: {wrong}")


def _wrong(response: httpx.Response) -> str | None:
    if response.status_code >= 400:
        return response.text[:300]
    return None if isinstance(response.json(), dict) else f"no answer: {response.text[:300]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or go on with a run."""
    parser = argparse.ArgumentParser("bench.load.run", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="mixed", choices=("mixed", *PLAIN, *METHODS))
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    log = BatchLog(options.out or RESULTS / f"{options.method}.jsonl")
    deadline = time.monotonic() + options.seconds
    with (
        tempfile.TemporaryDirectory() as folder,
        make_server(Path(folder), stock=options.method == "stock") as server,
    ):
        server.wait_until_ready()
        first = holdings(server)
        load = Load(server.url, options.method)
        started: Any = [asdict(h) for h in first]
        for number in range(log.num_batches, -(-options.requests // options.batch)):
            if time.monotonic() > deadline:
                break
            begin = time.monotonic()
            load.counts.clear()
            load.wrong.clear()
            seed = f"{options.seed}/{options.method}/{number}"
            asyncio.run(load.run(seed, options.batch, options.concurrency))
            state, held = check_idle(server, [h.pid for h in first]), holdings(server)
            samples = server.metrics().items()
            line = {
                "batch": number,
                "requests": options.batch,
                "seconds": round(time.monotonic() - begin, 1),
                "counts": dict(sorted(load.counts.items())),
                "wrong": load.wrong,
                "state": state,
                "preemptions": sum(v for (k, _), v in samples if k == "vllm:num_preemptions_total"),
                "held": [asdict(h) for h in held],
                "started": started,
                **({} if number else {"manifest": manifest("bench.load.run", options.seed)}),
            }
            started = None
            log.add(line)
            shown = {k: line[k] for k in ("batch", "seconds", "counts", "wrong", "state")}
            print(json.dumps(shown), {h.name: h.rss_mb for h in held}, flush=True)
            show_trouble(server, load.wrong, state)
            if state is not None:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
