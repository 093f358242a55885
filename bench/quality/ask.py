"""Asking the served engine: many requests at once over the OpenAI API, greedy."""

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from openai import AsyncOpenAI
from PIL import Image

from bench.quality.cells import OFF, Cell
from bench.quality.store import SERVED, Answers
from bench.tasks.held_out import TASKS, Item
from tokenprune.demo.local_server import LocalServer
from tokenprune.errors import TokenPruneError

MODEL = "quality"
# the first requests wait for warm-up, and slow machines queue
_TIMEOUT_SECONDS = 300.0


def messages(item: Item) -> list[dict[str, Any]]:
    """Return one user message: pictures as data URLs, which lose nothing, then the text."""
    parts: list[dict[str, Any]] = []
    for pixels in item.pictures:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": item.text}]}]


def engine_shape(server: LocalServer) -> dict[str, Any]:
    """Return layers and boundaries of a served engine."""
    shape: dict[str, Any] = json.loads(server.get("/v1/pruning/policies"))["engine"]
    return shape


def counted(
    answer: Mapping[str, Any], cell: Cell, engine: Mapping[str, Any]
) -> tuple[float, float]:
    """Return the tokens of the cell's axis seen, and those kept as the mean over layers.

    The server counts no visual tokens of an unpruned request: then both are 0.

    Raises:
        TokenPruneError: Something else than the cell's method was applied.
    """
    words, usage = answer.get("pruning") or {}, answer["usage"]
    applied = {axis: name for axis, name in words.get("applied", {}).items() if name is not None}
    asked = cell.pruning(0)
    if applied != ({} if isinstance(asked, str) else {a: f["method"] for a, f in asked.items()}):
        raise TokenPruneError(f"the server must apply {cell.method}, got {words}")
    if cell.method == OFF:
        # the last token is returned before its KV is computed
        computed = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        return (0, 0) if cell.axis == "visual" else (computed, computed)
    pruning = usage["pruning"]
    if cell.axis != "visual":
        return pruning["kv_tokens_logical"], pruning["kv_tokens_physical"]
    starts = [0, *engine["prune_layers"]]
    sizes = [b - a for a, b in zip(starts, [*starts[1:], engine["num_layers"]], strict=True)]
    kept = pruning["visual_tokens_kept"].values()
    held = sum(n * size for n, size in zip(kept, sizes, strict=True))
    return pruning["visual_tokens"], round(held / engine["num_layers"], 2)


def ask_all(
    server: LocalServer,
    engine: Mapping[str, Any],
    work: Sequence[tuple[Cell, Item]],
    answers: Answers,
    concurrency: int,
    advance: Callable[[Cell], object],
) -> None:
    """Ask everything in `work`, storing each answer as it comes."""
    asyncio.run(_ask_all(server, engine, iter(work), answers, concurrency, advance))


async def _ask_all(
    server: LocalServer,
    engine: Mapping[str, Any],
    work: Iterable[tuple[Cell, Item]],
    answers: Answers,
    concurrency: int,
    advance: Callable[[Cell], object],
) -> None:
    async def ask_some(client: AsyncOpenAI) -> None:
        # all workers share one iterator: no pause at the end of a cell
        for cell, item in work:
            answers.add(cell, item.index, SERVED, **await _ask(client, cell, item, engine))
            advance(cell)

    async with server.async_client(_TIMEOUT_SECONDS) as client:
        await asyncio.gather(*(ask_some(client) for _ in range(concurrency)))


async def _ask(
    client: AsyncOpenAI, cell: Cell, item: Item, engine: Mapping[str, Any]
) -> dict[str, Any]:
    asked: Any = messages(item)
    response = await client.chat.completions.create(
        model=MODEL,
        messages=asked,
        max_tokens=TASKS[cell.task].max_tokens,
        temperature=0,
        extra_body={"pruning": cell.pruning(item.index), "return_token_ids": True},
    )
    seen, kept = counted(response.model_dump(), cell, engine)
    choice = response.choices[0].model_dump()
    return {
        "item": item.digest,
        "text": choice["message"]["content"] or "",
        "tokens": choice["token_ids"],
        "seen": seen,
        "kept": kept,
    }
