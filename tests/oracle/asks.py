"""Requests as tests write them: a prompt, pictures by seed, flat keys; and what came back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

WIDE = 1000
TOLERANCE = 1e-4  # log-probs in float32 against float64

DESCRIBE = "USER: <image>\nWhat is in the picture?\nASSISTANT:"
STORY = "USER: " + " ".join(f"On day {i} it was {i % 7}." for i in range(24)) + "\nASSISTANT:"
COMPARE = "USER: <image>\nand\n<image>\nWhich one is brighter, and why?\nASSISTANT:"
TEXT = "USER: Tell me about the weather in the mountains.\nASSISTANT:"


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


def cuts(
    method: str, layers: Sequence[int], ratios: Sequence[float], **parameters: Any
) -> dict[str, Any]:
    """Return the flat keys of visual pruning by a schedule of its own."""
    own = {"method": method, "prune_layers": layers, "keep_ratios": ratios, **parameters}
    return {f"pruning_visual_{k}": v for k, v in own.items()}


def vflowopt(keep_ratio: float | None = 0.3, **parameters: Any) -> dict[str, Any]:
    """Return the flat keys of VFlowOpt; None leaves the kept share to other parameters."""
    keys = visual("vflowopt", keep_ratio or 0, **parameters)
    if keep_ratio is None:
        del keys["pruning_visual_keep_ratio"]
    return keys


def kv(method: str, keep_ratio: float = 0.25, **parameters: Any) -> dict[str, Any]:
    """Return the flat keys of KV eviction, with partitions small enough for short prompts."""
    keys = {"method": method, "keep_ratio": keep_ratio, "sink": 4, "lag": 16, **parameters}
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
