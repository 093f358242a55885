"""One real engine in this process, and what tests ask of it."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenprune.engine.launch import engine_arguments
from tokenprune.lengths import PromptLayout
from tokenprune.policies import EngineShape, VisualPolicy
from tokenprune.request import parse_pruning

NUM_LAYERS = 8
SHAPE = EngineShape(NUM_LAYERS, (0, 2, 3, 5), 2048)
WIDE = 1000
TOLERANCE = 1e-4  # log-probs in float32 against float64


def image(seed: int) -> Image.Image:
    """Return a small picture of coloured blocks; different seeds look different.

    Seeds from `WIDE` on give a wide picture, which any-resolution models see in part.
    """
    blocks = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    size = (96, 96) if seed < WIDE else (170, 70)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def visual(method: str, keep_ratio: float = 0.25, **parameters: Any) -> dict[str, Any]:
    """Return the flat keys of visual pruning."""
    keys = {"method": method, "keep_ratio": keep_ratio, **parameters}
    return {f"pruning_visual_{k}": v for k, v in keys.items()}


def kv(method: str, keep_ratio: float = 0.25, **parameters: Any) -> dict[str, Any]:
    """Return the flat keys of KV eviction, with partitions small enough for short prompts."""
    keys = {"method": method, "keep_ratio": keep_ratio, "sink": 4, "lag": 8, **parameters}
    return {f"pruning_kv_{k}": v for k, v in keys.items()}


def channels(keep_ratio: float = 0.5, **parameters: Any) -> dict[str, Any]:
    """Return the flat keys of ThinK, with a window and recent tokens for short prompts."""
    keys = {"method": "think", "keep_ratio": keep_ratio, "window": 8, "recent": 6, **parameters}
    return {f"pruning_channels_{k}": v for k, v in keys.items()}


@dataclass
class Ask:
    """One request."""

    prompt: str
    images: tuple[int, ...] = ()
    pruning: dict[str, Any] | None = None
    max_tokens: int = 8


@dataclass
class Answer:
    """Tokens, and per token the log-probs of the likeliest ones by token id."""

    tokens: list[int]
    logprobs: list[dict[int, float]]

    def agrees_with(self, other: Answer, tolerance: float = TOLERANCE) -> bool:
        """Return whether tokens are equal and shared log-probs are close."""
        return self.tokens == other.tokens and all(
            math.isclose(a[t], b[t], abs_tol=tolerance)
            for a, b in zip(self.logprobs, other.logprobs, strict=True)
            for t in a.keys() & b.keys()
        )


DESCRIBE = "USER: <image>\nWhat is in the picture?\nASSISTANT:"
STORY = "USER: " + " ".join(f"On day {i} it was {i % 7}." for i in range(24)) + "\nASSISTANT:"
COMPARE = "USER: <image>\nand\n<image>\nWhich one is brighter, and why?\nASSISTANT:"
TEXT = "USER: Tell me about the weather in the mountains.\nASSISTANT:"


class Engine:
    """vLLM in this process, so that tests see the scheduler and its block pool."""

    def __init__(self, checkpoint: Path, *, pruning: bool = True, **arguments: Any) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_model_len": 2048,
            "max_num_batched_tokens": 2048,
            "block_size": 32,
            "limit_mm_per_prompt": {"image": 4},
            "disable_log_stats": True,
        }
        if pruning:
            defaults |= engine_arguments(
                arguments.pop("prune_layers", None),
                allow_channel_pruning=arguments.pop("allow_channel_pruning", False),
            )
        self.llm = LLM(str(checkpoint), **(defaults | arguments))

    @property
    def scheduler(self) -> Any:
        """The live scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def blocks_missing(self) -> int:
        """Blocks not in the pool; the null block never is."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def ask(self, *asks: Ask) -> list[Answer]:
        """Run requests together and return their answers in order."""
        return self._ask([_prompt(a) for a in asks], asks)

    def ask_with(self, ask: Ask, data: dict[str, Any]) -> list[Answer]:
        """Run a request with other data than its images."""
        return self._ask([{"prompt": ask.prompt, "multi_modal_data": data}], [ask])

    def _ask(self, prompts: list[Any], asks: Sequence[Ask]) -> list[Answer]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            prompts,
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=a.max_tokens,
                    ignore_eos=True,
                    logprobs=5,
                    extra_args=a.pruning,
                )
                for a in asks
            ],
            use_tqdm=False,
        )
        return [
            Answer(
                list(o.outputs[0].token_ids),
                [{t: p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs],
            )
            for o in outputs
        ]

    def close(self) -> None:
        """Release the engine's memory."""
        del self.llm
        gc.collect()


def _prompt(ask: Ask) -> dict[str, Any]:
    data = {"multi_modal_data": {"image": [image(s) for s in ask.images]}} if ask.images else {}
    return {"prompt": ask.prompt, **data}


def policy_of(pruning: dict[str, Any]) -> VisualPolicy:
    """Return the visual policy that flat keys ask for."""
    prefix = "pruning_visual_"
    policy = parse_pruning(
        {"visual": {k.removeprefix(prefix): v for k, v in pruning.items()}}
    ).policy("visual")
    assert isinstance(policy, VisualPolicy)
    return policy


def layout_of(visual_rows: Any) -> PromptLayout:
    """Return the layout of a prompt from its bool mask of visual rows."""
    spans, start = [], None
    for i, flag in enumerate([*visual_rows.tolist(), False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            spans.append((start, i))
            start = None
    return PromptLayout(len(visual_rows), tuple(spans))
