"""Translates a request for the oracle: counts and known ranks from the plan, choices of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.oracle.asks import TOLERANCE, Answer, Ask, image
from tests.oracle.channels import Thinned
from tests.oracle.kv import Evicted, lag_choice
from tests.oracle.loop import Oracle, Trace
from tests.oracle.visual import Pruned
from tokenprune.kernels import lag_keep
from tokenprune.lengths import PromptLayout
from tokenprune.policies import Segments, VisualPolicy
from tokenprune.policies.kv.random import RandomKV
from tokenprune.request import parse_pruning
from tokenprune.shape import EngineShape

BLOCK = 32
SHAPE = EngineShape(8, (0, 2, 3, 5), 2048)


@dataclass
class Comparison:
    """An answer beside the loop's.

    Attributes:
        difference: Largest difference of log-probs.
        trace: What the loop computed.
        evicted: What it evicted, or None.
        thinned: What it dropped of channels, or None.
    """

    difference: float
    trace: Trace
    evicted: Evicted | None
    thinned: Thinned | None


def compare(
    oracle: Oracle,
    ask: Ask,
    answer: Answer,
    *,
    chunk: int | None = None,
    pictures: list[Any] | None = None,
    shape: EngineShape = SHAPE,
) -> Comparison:
    """Run the loop over an answer, with what the request drops.

    Args:
        oracle: The loop.
        ask: The request.
        answer: What the engine answered.
        chunk: Tokens of a step of the prompt, for eviction after each chunk.
        pictures: In place of the request's images.
        shape: The engine's.
    """
    images = pictures or [image(s) for s in ask.images]
    _, rows = oracle.embed(ask.prompt, images)
    text = oracle.model.config.text_config
    evicted = evicted_like(ask, len(rows), text.num_key_value_heads, chunk)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    thinned = thinned_like(ask, head_size)
    pruned = pruned_like(oracle, ask, images, shape)
    trace = oracle.run(ask.prompt, images, answer.tokens, pruned, evicted, thinned)
    steps = zip(trace.logprobs, answer.logprobs, strict=True)
    largest = max(abs(float(x[t]) - p) for x, found in steps for t, p in found.items())
    return Comparison(largest, trace, evicted, thinned)


def assert_like_oracle(
    oracle: Oracle,
    ask: Ask,
    answer: Answer,
    *,
    chunk: int | None = None,
    pictures: list[Any] | None = None,
    shape: EngineShape = SHAPE,
) -> Comparison:
    """Compare as `compare` does, and refuse log-probs that are further off than rounding is."""
    found = compare(oracle, ask, answer, chunk=chunk, pictures=pictures, shape=shape)
    assert found.difference <= TOLERANCE, f"{found.difference} off for {ask}"
    return found


def pruned_like(
    oracle: Oracle, ask: Ask, images: list[Any], shape: EngineShape = SHAPE
) -> Pruned | None:
    """Return which rows are dropped, or None."""
    keys = _keys(ask, "visual")
    if not keys:
        return None
    _, rows = oracle.embed(ask.prompt, images)
    policy = parse_pruning({"visual": keys}).policy("visual")
    assert isinstance(policy, VisualPolicy)
    return Pruned.like(policy, layout_of(rows, len(images)), shape)


def evicted_like(ask: Ask, num_tokens: int, heads: int, chunk: int | None = None) -> Evicted | None:
    """Return which KV tokens are evicted, or None."""
    keys = _keys(ask, "kv")
    if not keys:
        return None
    keep = max(1, int(keys["keep_ratio"] * keys["lag"]))
    choices = {
        "lagkv": lag_choice(keep),
        "streaming": None,
        "random": _random_choice(keys.get("seed", 0), keep, keys["lag"], heads),
    }
    chunks = None
    if keys.get("when") == "chunk" and chunk is not None:
        chunks = [min(chunk, num_tokens - start) for start in range(0, num_tokens, chunk)]
    return Evicted(keys["sink"], keys["lag"], keep, choices[keys["method"]], chunks)


def thinned_like(ask: Ask, head_size: int) -> Thinned | None:
    """Return which channels are zeroed, or None."""
    keys = _keys(ask, "channels")
    if not keys:
        return None
    kept = int(keys["keep_ratio"] * head_size)
    values = int(keys.get("values_keep_ratio", 1) * head_size)
    tokens = BLOCK * 2 * head_size // (kept + values)
    generated = keys.get("pack_generated", True)
    return Thinned(kept, values, keys["window"], keys["recent"], tokens, generated)


def layout_of(visual_rows: Any, num_images: int | None = None) -> PromptLayout:
    """Return the layout of a prompt from its bool mask of visual rows.

    Args:
        visual_rows: `[n]`.
        num_images: Of a single one the runs of visual rows are parts; of more each is one.
    """
    spans, start = [], None
    for i, flag in enumerate([*visual_rows.tolist(), False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            spans.append((start, i))
            start = None
    return PromptLayout(len(visual_rows), tuple(spans), (len(spans),) if num_images == 1 else ())


def _keys(ask: Ask, axis: str) -> dict[str, Any]:
    start = f"pruning_{axis}_"
    return {k.removeprefix(start): v for k, v in (ask.pruning or {}).items() if k.startswith(start)}


def _random_choice(seed: int, keep: int, lag: int, heads: int) -> Any:
    def choose(*arguments: Any) -> list[int]:
        layer, head, number = arguments[-3:]
        segments = Segments(1, number, lag, layer, heads, "cpu")
        return lag_keep(RandomKV(seed=seed).score(segments), keep)[head, 0].tolist()

    return choose
