"""What a response says about pruning: `usage.pruning`, `pruning`, and one header.

All figures follow from the plan and the token counts alone, so the API process computes them
without asking the engine. Over several prompts or choices (`n` above 1) they add up: visual
tokens once per prompt, as `prompt_tokens` does, KV figures once per sequence. Clients that merge
the usage of several answers add up whatever they find there, so it holds whole numbers only, and
always the same ones; what was applied is said in words beside it.

* `kv_tokens_logical`: tokens computed per sequence, prompt + completion - 1 (the last sampled
  token is returned before its KV is computed).
* `kv_tokens_physical`: KV slots held at the end, as the mean over the layers, rounded. A packed
  block counts its slots, although it holds more tokens.
* `kv_bytes_saved`: sum over layers of (logical - physical) * bytes per token and layer, which is
  `2 * KV heads * head size * bytes per element`; blocks round the real figure to their size.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from tokenprune.cost import slots_held
from tokenprune.errors import PolicyError
from tokenprune.lengths import PromptLayout
from tokenprune.plan import RequestPlan
from tokenprune.policies import AXES, Axis, ChannelPlan, KVPlan, VisualPlan
from tokenprune.request import Axes
from tokenprune.shape import EngineShape, ModelShape

HEADER = "x-tokenprune-applied"
# inside a JSON string the quotes would be escaped, so generated text never matches
_USAGE_KEY = b'"usage":{'
_DATA = b"data: "


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
        notes: What its answer should say besides.
        prompts: One per prompt sent to the engine.
        refused: Why a prompt was refused, or None.
    """

    pruning: Axes
    explicit: bool = True
    bypass: str | None = None
    notes: tuple[str, ...] = ()
    prompts: list[PromptRecord] = field(default_factory=list)
    refused: PolicyError | None = None

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


def figures_block(
    record: RequestRecord, engine: EngineShape, model: ModelShape
) -> dict[str, Any] | None:
    """Return the value of `usage.pruning`, or None where no prompt was planned."""
    if not record.prompts:
        return None
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
    return {
        "visual_tokens": sum(entry.prompt.num_visual for entry in record.prompts),
        "visual_tokens_kept": {
            str(layer): count for layer, count in zip(engine.boundaries, kept, strict=True)
        },
        "kv_tokens_logical": logical,
        "kv_tokens_physical": round(held_layers / engine.num_layers),
        "kv_bytes_saved": (logical * engine.num_layers - held_layers)
        * model.kv_bytes_per_token_layer,
    }


def words_block(record: RequestRecord) -> dict[str, Any]:
    """Return the value of `pruning`, which stands beside `usage`."""
    return {
        "applied": record.applied(),
        "skipped": record.skipped(),
        "visual_layers": [layer for layer, _ in record.cuts()],
        "notes": list(record.notes),
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


def add_to_whole(
    body: bytes, record: RequestRecord, engine: EngineShape, model: ModelShape
) -> bytes:
    """Return a JSON answer with both blocks."""
    answer = json.loads(body)
    # vLLM's routes answer `null` where they take the client to have left
    if not isinstance(answer, dict):
        return body
    _add(answer, record, engine, model)
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def add_to_events(
    body: bytes, record: RequestRecord, engine: EngineShape, model: ModelShape
) -> bytes:
    """Return server-sent events, with both blocks in the one that closes the usage.

    That is the one with usage and without choices: running usage of single tokens is left as it
    is, because the counts are final only at the end.
    """
    if _USAGE_KEY not in body:
        return body
    lines = body.split(b"\n")
    for i, line in enumerate(lines):
        if line.startswith(_DATA) and _USAGE_KEY in line:
            event = json.loads(line.removeprefix(_DATA))
            if not event.get("choices"):
                # `/v1/responses` closes with the whole answer in an event
                whole = event.get("response")
                _add(whole if isinstance(whole, dict) else event, record, engine, model)
                text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
                lines[i] = _DATA + text.encode()
    return b"\n".join(lines)


def _add(
    answer: dict[str, Any], record: RequestRecord, engine: EngineShape, model: ModelShape
) -> None:
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return
    figures = figures_block(record, engine, model)
    if figures is not None:
        usage["pruning"] = figures
    answer["pruning"] = words_block(record)
