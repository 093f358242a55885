"""Servers, questions and load of `bench.serving`."""

import asyncio
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from PIL import Image

from tokenprune.demo.local_server import LocalServer
from tokenprune.demo.measure import photographs, prompt_content
from tokenprune.demo.report import Samples, kv_pool

MODEL = "bench"
CROP = 336
_TIMEOUT_SECONDS = 300.0
_POLL_SECONDS = 0.05

Messages = list[dict[str, Any]]


class StockServer(LocalServer):
    """vLLM's own API server with none of our plugins; on a CPU on the runner it chooses there."""

    def __init__(self, model: Path, arguments: Sequence[str], log: Path, *, is_cpu: bool) -> None:
        super().__init__(model, arguments, log)
        runner = ["VLLM_USE_V2_MODEL_RUNNER=0"] if is_cpu else []
        # not the `vllm` script, which asks for a distribution that CPU builds do not have
        module = "vllm.entrypoints.openai.api_server"
        place = ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        self._command = [
            *("env", "VLLM_PLUGINS=", *runner),
            *(sys.executable, "-m", module, "--model", str(model), *place, *arguments),
        ]


@dataclass
class Answer:
    """One streamed answer.

    Attributes:
        ttft_ms: From sending the request to the first chunk with a token.
        gaps_ms: Between chunks; vLLM sends one per token unless its API process falls behind.
        tokens: Ids of the generated tokens.
        applied: Visual method that the server says it applied, or None.
        prompt_tokens: Length of the prompt as the server counts it.
    """

    ttft_ms: float
    gaps_ms: list[float]
    tokens: list[int]
    applied: str | None
    prompt_tokens: int


@dataclass
class Burst:
    """One round of one cell: its answers and how long all of them took together."""

    seconds: float
    answers: list[Answer] = field(repr=False)
    kv_blocks_peak: int = 0

    @property
    def requests_per_second(self) -> float:
        """Finished requests over the wall clock."""
        return len(self.answers) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the wall clock."""
        return sum(len(answer.tokens) for answer in self.answers) / self.seconds


def questions(seed: int, images: int) -> Iterator[Messages]:
    """Yield prompts without end; no two show the same crop or ask the same text."""
    pictures = photographs()
    rng = random.Random(seed)
    width, height = (size - CROP for size in pictures[0].size)
    places = [
        (n, x, y) for n in range(len(pictures)) for x in range(0, width, 2) for y in range(height)
    ]
    rng.shuffle(places)
    crops = (_crop(pictures[n], x, y) for n, x, y in places)
    number = 0
    while True:
        content = prompt_content([next(crops) for _ in range(images)])
        # replaces the demo's question
        content[-1] = {"type": "text", "text": f"Case {number:06d}. What do you see, and where?"}
        yield [{"role": "user", "content": content}]
        number += 1


def _crop(picture: Image.Image, x: int, y: int) -> Image.Image:
    return picture.crop((x, y, x + CROP, y + CROP))


def run_burst(
    server: LocalServer,
    prompts: Sequence[Messages],
    fields: Sequence[dict[str, Any] | None],
    concurrency: int,
    num_tokens: int,
    *,
    watch_memory: bool = False,
) -> Burst:
    """Send all `prompts`, `concurrency` at a time, and return once each is answered.

    Args:
        server: Where to.
        prompts: One per request.
        fields: The `pruning` field of each request; None leaves it out.
        concurrency: Requests in flight; the next one starts when one ends.
        num_tokens: Tokens to generate, no more and no fewer.
        watch_memory: Poll the KV cache's use meanwhile; this takes time from the engine.
    """
    load = _load(server, prompts, fields, concurrency, num_tokens, watch_memory)
    return asyncio.run(load)


async def _load(
    server: LocalServer,
    prompts: Sequence[Messages],
    fields: Sequence[dict[str, Any] | None],
    concurrency: int,
    num_tokens: int,
    watch_memory: bool,
) -> Burst:
    waiting = iter(zip(prompts, fields, strict=True))
    answers: list[Answer] = []
    async with server.async_client(_TIMEOUT_SECONDS) as client:

        async def work() -> None:
            for messages, pruning in waiting:
                answers.append(await ask(client, messages, pruning, num_tokens))

        async def poll() -> None:
            while True:
                samples = await asyncio.to_thread(server.metrics)
                readings.append(kv_pool(samples)[0])
                await asyncio.sleep(_POLL_SECONDS)

        readings = [0]
        watcher = asyncio.create_task(poll()) if watch_memory else None
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        seconds = time.perf_counter() - started
        if watcher is not None:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
    return Burst(seconds, answers, max(readings))


async def ask(
    client: AsyncOpenAI,
    messages: Any,
    pruning: dict[str, Any] | None,
    num_tokens: int,
    began: asyncio.Event | None = None,
) -> Answer:
    """Return the streamed answer to one request; `began` is set with its first token."""
    times, tokens, usage, words = [time.perf_counter()], [], {}, {}
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        # random weights may call for the end at any time
        extra_body={
            "ignore_eos": True,
            "return_token_ids": True,
            **({} if pruning is None else {"pruning": pruning}),
        },
    )
    async for chunk in stream:
        if chunk.usage is not None:
            usage = chunk.usage.model_dump()
            words = (chunk.model_extra or {}).get("pruning") or {}
        new = chunk.choices[0].model_dump().get("token_ids") if chunk.choices else None
        if new:
            times.append(time.perf_counter())
            tokens += new
            if began is not None:
                began.set()
    gaps = [round(1e3 * (b - a), 2) for a, b in pairwise(times)]
    applied = (words.get("applied") or {}).get("visual")
    return Answer(gaps[0], gaps[1:], tokens, applied, usage["prompt_tokens"])


def preemptions(samples: Samples) -> int:
    """Return vLLM's own count of preemptions since start."""
    return int(sum(v for (name, _), v in samples.items() if name == "vllm:num_preemptions_total"))
