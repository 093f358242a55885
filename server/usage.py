"""What a response says about pruning: `usage.pruning`, one header, and the stream's last chunk.

All figures follow from the plan and the token counts alone, so the API process computes them
without asking the engine. Over several prompts or choices (`n` above 1) they add up: visual
tokens once per prompt, as `prompt_tokens` does, KV figures once per sequence.

* `kv_tokens_logical`: tokens computed per sequence, prompt + completion - 1 (the last sampled
  token is returned before its KV is computed).
* `kv_tokens_physical`: KV slots held at the end, as the mean over the layers. A packed block counts
  its slots, although it holds more tokens.
* `kv_bytes_saved`: sum over layers of (logical - physical) * bytes per token and layer, which is
  `2 * KV heads * head size * bytes per element`; blocks round the real figure to their size.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from tokenprune.cost import slots_held
from tokenprune.lengths import PromptLayout
from tokenprune.plan import RequestPlan
from tokenprune.policies import AXES, Axis, ChannelPlan, KVPlan, VisualPlan
from tokenprune.request import Axes
from tokenprune.shape import EngineShape, ModelShape

HEADER = "x-tokenprune-applied"
# inside a JSON string the quotes would be escaped, so generated text never matches
_USAGE_KEY = '"usage":{'


@dataclass(slots=True)
class PromptRecord:
    """One prompt of an HTTP request.

    Attributes:
        plan: What the engine does with it.
        prompt: Where its visual tokens are.
        completions: Tokens generated so far, per choice.
    """

    plan: RequestPlan
    prompt: PromptLayout
    completions: list[int]


@dataclass(slots=True)
class RequestRecord:
    """What one HTTP request asked for and got; filled as prompts are admitted.

    Attributes:
        pruning: What it asked for, or the server's default.
        explicit: Whether it asked itself.
        bypass: Reason to serve it unpruned without planning, or None.
        prompts: One per prompt sent to the engine.
    """

    pruning: Axes
    explicit: bool = True
    bypass: str | None = None
    prompts: list[PromptRecord] = field(default_factory=list)

    def skipped(self) -> dict[str, str]:
        """Return the reason per axis that was asked for and not applied to every prompt."""
        if self.bypass is not None:
            return {axis: self.bypass for axis in AXES if self.pruning.policy(axis) is not None}
        return {axis: why.reason for p in self.prompts for axis, why in p.plan.skipped.items()}

    def applied(self) -> dict[str, str | None]:
        """Return the method per axis that was applied to at least one prompt."""
        return {
            axis: part.policy.name if (part := self.part(axis)) is not None else None
            for axis in AXES
        }

    def part(self, axis: Axis) -> VisualPlan | KVPlan | ChannelPlan | None:
        """Return the plan of an axis that was applied; it tells the same of all such prompts."""
        parts = (prompt.plan.part(axis) for prompt in self.prompts)
        return next((part for part in parts if part is not None), None)

    def cuts(self) -> tuple[tuple[int, float], ...]:
        """Return `(layer, keep ratio)` of the visual cuts; equal for all pruned prompts."""
        return next((p.plan.visual.cuts for p in self.prompts if p.plan.visual is not None), ())


current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)


def usage_block(record: RequestRecord, engine: EngineShape, model: ModelShape) -> dict[str, Any]:
    """Return the value of `usage.pruning`."""
    block: dict[str, Any] = {"applied": record.applied(), "skipped": record.skipped()}
    if not record.prompts:
        return block
    kept = [0] * engine.num_stages
    logical = held_layers = 0
    for entry in record.prompts:
        plan, total = entry.plan, entry.prompt.num_visual
        stages = plan.visual.kept if plan.visual is not None else (total,) * engine.num_stages
        kept = [a + b for a, b in zip(kept, stages, strict=True)]
        for completion in entry.completions:
            computed = entry.prompt.num_tokens + max(completion - 1, 0)
            logical += computed
            held_layers += slots_held(plan.lengths, engine, computed)
    return block | {
        "visual_tokens": sum(entry.prompt.num_visual for entry in record.prompts),
        "visual_tokens_kept": kept,
        "visual_layers": [layer for layer, _ in record.cuts()],
        "kv_tokens_logical": logical,
        "kv_tokens_physical": round(held_layers / engine.num_layers, 1),
        "kv_bytes_saved": (logical * engine.num_layers - held_layers)
        * model.kv_bytes_per_token_layer,
    }


def header_value(record: RequestRecord) -> str:
    """Return the value of the response header, e.g. `visual=uniform;keep_ratio=0.25;layers=2,3`."""
    applied = []
    for axis in AXES:
        part = record.part(axis)
        if part is not None:
            words = [f"{axis}={part.policy.name}"]
            words += [f"{key}={value}" for key, value in part.summary().items()]
            applied.append(";".join(words))
    return ", ".join(applied) or "none"


async def add_to_stream(
    chunks: AsyncIterator[Any], block: Callable[[], dict[str, Any]]
) -> AsyncGenerator[Any, None]:
    """Pass server-sent events on, adding `usage.pruning` to the one that closes the usage.

    That is the chunk with usage and without choices; running usage of single tokens is left as
    it is, because the counts are final only at the end.
    """
    async with aclosing(cast("AsyncGenerator[Any, None]", chunks)):
        async for chunk in chunks:
            yield _with_usage(chunk, block) if isinstance(chunk, str) else chunk


def _with_usage(chunk: str, block: Callable[[], dict[str, Any]]) -> str:
    if _USAGE_KEY not in chunk or not chunk.startswith("data: "):
        return chunk
    event = json.loads(chunk.removeprefix("data: "))
    if event.get("choices"):
        return chunk
    event["usage"]["pruning"] = block()
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
