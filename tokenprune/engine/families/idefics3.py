"""Idefics3: each tile of an image is a span, with its place as text between them."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenprune.engine.families.base import Decoder, Family, llama_like


class Idefics3(Family):
    """Idefics3."""

    name: ClassVar[str] = "Idefics3"
    architectures: ClassVar[tuple[str, ...]] = ("Idefics3ForConditionalGeneration",)
    decoders: ClassVar[tuple[str, ...]] = ("llama",)

    def decoder(self, model: Any) -> Decoder:
        """Find the decoder's parts; the language model is the decoder itself."""
        return llama_like(model.get_language_model())
