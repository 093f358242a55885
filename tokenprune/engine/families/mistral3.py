"""Mistral-3 with a Pixtral tower: each row of an image is a span, with a break after it."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.engine.families.base import Family


class Mistral3(Family):
    """Mistral-3."""

    name: ClassVar[str] = "Mistral-3"
    architectures: ClassVar[tuple[str, ...]] = ("Mistral3ForConditionalGeneration",)
    decoders: ClassVar[tuple[str, ...]] = ("mistral",)
