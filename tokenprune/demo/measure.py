"""The demo's speed measurement: four photographs in one prompt, asked with and without pruning.

* KV blocks held: vLLM's own gauge on the metrics page, read while the answer is generated. These
  requests are not timed, because the page takes time from the engine.
* TTFT: from sending the request to the first streamed chunk, which vLLM sends with the first
  token. With prefix caching off every prompt is prefilled; the vision tower's output is cached for
  all methods alike. So the decoder's prefill is what differs.
* tokens/s: tokens after the first over the time they took.

Methods take turns and the order rotates each round.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from openai import OpenAI
from PIL import Image, ImageOps

from tokenprune.demo.local_server import LocalServer
from tokenprune.demo.report import SpeedRow, kv_pool
from tokenprune.errors import TokenPruneError
from tokenprune.installation import install_command
from tokenprune.policies import methods

MODEL = "demo"
QUESTION = "What do these four pictures have in common?"
OFF = "off"
# baselines first, then what is compared with them
METHODS = tuple(sorted(methods("visual"), key=lambda name: not methods("visual")[name].is_baseline))
NUM_ROUNDS = 5
NUM_OUTPUT_TOKENS = 32
NUM_REQUESTS = (len(METHODS) + 1) * (NUM_ROUNDS + 1)

_TIMEOUT_SECONDS = 120.0

PruningField = str | dict[str, Any]
PruningFields = dict[str, PruningField]


def photographs() -> list[Image.Image]:
    """Return four different pictures made of scikit-learn's two photographs.

    Raises:
        TokenPruneError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise TokenPruneError(
            "scikit-learn must be installed for its photographs, got none; "
            f"{install_command('demo')}"
        ) from error
    pictures = [Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]
    return [*pictures, *(ImageOps.mirror(picture) for picture in pictures)]


def prompt_content(pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Return the parts of one user message: the pictures as data URLs, then the question."""
    parts: list[dict[str, Any]] = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": QUESTION}]


def pruning_fields(
    keep_ratio: float, seed: int = 0, names: Sequence[str] = METHODS
) -> PruningFields:
    """Return the `pruning` field per row of the table; the unpruned row comes first.

    Args:
        keep_ratio: Share of the visual tokens that survives the last cut; of vflowopt's the mean
            over the layers.
        seed: Seed of the random choice.
        names: Methods of the rows besides the unpruned one.
    """
    fields: PruningFields = {OFF: OFF}
    for method in names:
        draw = {"seed": seed} if "seed" in methods("visual")[method].model_fields else {}
        fields[method] = {"visual": {"method": method, "keep_ratio": keep_ratio, **draw}}
    return fields


def closing_usage(method: str, chunk: Any) -> dict[str, Any]:
    """Return the usage in a stream's last chunk, which must name the method of its row.

    Raises:
        TokenPruneError: It names another one or none.
    """
    words = (chunk.model_extra or {}).get("pruning") or {}
    if words.get("applied", {}).get("visual") != (None if method == OFF else method):
        raise TokenPruneError(f"the server must apply {method}, got {words}")
    usage: dict[str, Any] = chunk.usage.model_dump()
    return usage


def measure(
    server: LocalServer,
    content: Sequence[Mapping[str, Any]],
    fields: PruningFields,
    advance: Callable[[], object],
) -> list[SpeedRow]:
    """Return one row per field, calling `advance` after each of the `NUM_REQUESTS` requests.

    Raises:
        TokenPruneError: An answer says that the method was not applied.
    """
    rows = [SpeedRow(name) for name in fields]
    with server.client(_TIMEOUT_SECONDS) as client:

        def ask(row: SpeedRow, each_chunk: Callable[[], None] | None = None) -> tuple[float, float]:
            pruning = fields[row.method]
            ttft, rate, row.usage = _ask(client, row.method, content, pruning, each_chunk)
            advance()
            return ttft, rate

        for row in rows:
            # also the warm-up: caches fill and the first decode step costs seconds once
            readings: list[int] = []
            ask(row, partial(_read_blocks, server, readings))
            row.kv_blocks = max(readings)
        for turn in range(NUM_ROUNDS):
            first = turn % len(rows)
            for row in (*rows[first:], *rows[:first]):
                ttft, rate = ask(row)
                row.ttft_seconds.append(ttft)
                row.tokens_per_second.append(rate)
    return rows


def _read_blocks(server: LocalServer, readings: list[int]) -> None:
    readings.append(kv_pool(server.metrics())[0])


def _ask(
    client: OpenAI,
    method: str,
    content: Sequence[Mapping[str, Any]],
    pruning: PruningField,
    each_chunk: Callable[[], None] | None,
) -> tuple[float, float, dict[str, Any]]:
    """Return time to first token, tokens per second after it, and the answer's usage."""
    messages: Any = [{"role": "user", "content": list(content)}]
    started = time.perf_counter()
    first = last = 0.0
    usage: dict[str, Any] = {}
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=NUM_OUTPUT_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        # random weights may call for the end at any time
        extra_body={"pruning": pruning, "ignore_eos": True},
    )
    for chunk in stream:
        if chunk.usage is not None:
            usage = closing_usage(method, chunk)
        if not chunk.choices:
            continue
        last = time.perf_counter()
        first = first or last
        if each_chunk is not None:
            each_chunk()
    return first - started, (usage["completion_tokens"] - 1) / (last - first), usage
