"""InternVL in the classes of transformers: one span of tiles and thumbnail."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.engine.families.base import Family


class InternVL(Family):
    """InternVL."""

    name: ClassVar[str] = "InternVL"
    architectures: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration",)
    decoders: ClassVar[tuple[str, ...]] = ("qwen2",)
