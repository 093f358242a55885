"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, dense.

Positions are M-RoPE, `[3, n]`. Qwen3-VL has DeepStack: after each of its first layers the model
adds features of the vision tower to the visual rows, outside any module, so all rows must be there
then. The features of a dropped token are dropped with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tokenprune.engine.families.base import Family

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class QwenVL(Family):
    """Qwen-VL with any of its towers."""

    name: ClassVar[str] = "Qwen-VL"
    architectures: ClassVar[tuple[str, ...]] = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    )
    decoders: ClassVar[tuple[str, ...]] = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")

    def visual_unsupported(self, vllm_config: VllmConfig) -> str | None:
        """Return why visual tokens of this model cannot be pruned, or None if they can."""
        if vllm_config.model_config.multimodal_config.is_multimodal_pruning_enabled():
            return "vLLM itself prunes videos (--video-pruning-rate)"
        return super().visual_unsupported(vllm_config)

    def num_late(self, vllm_config: VllmConfig) -> int:
        """Return the levels of DeepStack."""
        vision = vllm_config.model_config.hf_config.vision_config
        return len(getattr(vision, "deepstack_visual_indexes", None) or ())
