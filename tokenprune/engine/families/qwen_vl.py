"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, dense or with a mixture of experts.

Positions are M-RoPE, `[3, n]`. Qwen3-VL has DeepStack: after each of its first layers the model
adds features of the vision tower to the visual rows, outside any module, so all rows must be there
then. The features of a dropped token are dropped with it, and those of a token that others are
merged into stay its own.

The towers see images at their own resolution, without a class token, and merge squares of patches
into tokens. Frames of a video, two by two, attend to themselves alone, and are scored as crops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokenprune.engine.families.base import (
    Family,
    ImageScores,
    Picture,
    Tower,
    before_normalisation,
)

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig


class QwenVL(Family):
    """Qwen-VL with any of its towers."""

    name: ClassVar[str] = "Qwen-VL"
    architectures: ClassVar[tuple[str, ...]] = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )
    decoders: ClassVar[tuple[str, ...]] = (
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3_vl_text",
        "qwen3_vl_moe_text",
    )
    towers: ClassVar[tuple[str, ...]] = (
        "qwen2_vl_vision",
        "qwen2_5_vl_vision",
        "qwen3_vl_vision",
        "qwen3_vl_moe_vision",
    )

    def visual_unsupported(self, vllm_config: VllmConfig) -> str | None:
        """Return why visual tokens of this model cannot be pruned, or None if they can."""
        if vllm_config.model_config.multimodal_config.is_multimodal_pruning_enabled():
            return "vLLM itself prunes videos (--video-pruning-rate)"
        return super().visual_unsupported(vllm_config)

    def num_late(self, vllm_config: VllmConfig) -> int:
        """Return the levels of DeepStack."""
        vision = vllm_config.model_config.hf_config.vision_config
        return len(getattr(vision, "deepstack_visual_indexes", None) or ())

    def importance_unsupported(self, vllm_config: VllmConfig) -> str | None:
        """Return why the patches of images cannot be scored, or None."""
        vision = vllm_config.model_config.hf_config.vision_config
        if vision.model_type not in self.towers:
            return f"vision tower type {vision.model_type!r} is not among {', '.join(self.towers)}"
        whole = getattr(vision, "fullatt_block_indexes", None)
        if whole is not None and vision.depth - 1 not in whole:
            return "patches attend within windows in the last layer of the vision tower"
        if vllm_config.compilation_config.compile_mm_encoder:
            return "the vision tower is compiled (compile_mm_encoder)"
        return None

    def patch_grid(self, vllm_config: VllmConfig) -> int | None:
        """Return None: every image has a grid of its own."""
        return None

    def tower(self, vllm_config: VllmConfig, model: Any) -> Tower:
        """Find the tower, whose last layer is used."""
        return QwenTower(vllm_config, model)


class QwenTower(Tower):
    """A tower that sees patches square by square, each square one token."""

    def __init__(self, vllm_config: VllmConfig, model: Any) -> None:
        self._model_config = vllm_config.model_config
        vision = vllm_config.model_config.hf_config.vision_config
        self.patch = int(vision.patch_size)
        self._side = int(vision.spatial_merge_size)
        self._frames = int(vision.temporal_patch_size)
        self.module = model.visual
        self.attention: Any = model.visual.blocks[-1].attn.attn
        self.scale = float(self.attention.scale)

    def heads(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], picture: Picture
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys; they come as `[1, rows, H, D]`, with RoPE."""
        query, key = (
            self._row_by_row(self._square_by_square(kwargs[name][0], picture), picture)
            for name in ("query", "key")
        )
        return query.transpose(1, 2), key.transpose(1, 2)

    def pixels(self, args: Sequence[Any], crop: int, picture: Picture) -> Tensor:
        """Put the patches of a crop together; of two frames that share patches, the first."""
        patches = self._row_by_row(args[0], picture)[crop]
        _, height, width = _grid(picture)
        patches = patches.view(height, width, -1, self._frames, self.patch, self.patch)
        # channels first, rows of pixels within rows of patches
        pixels = patches[:, :, :, 0].permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        return before_normalisation(self._model_config, pixels, picture.modality)

    def lay_out(self, scores: Tensor, picture: Picture) -> ImageScores:
        """Give each token the mean of its patches."""
        frames, height, width = _grid(picture)
        side = self._side
        tokens = scores.view(frames, height // side, side, width // side, side).mean((2, 4))
        grids = ((tokens.numel(), width // side),)
        return ImageScores(tokens.flatten(), grids, picture.modality == "video")

    def _square_by_square(self, rows: Tensor, picture: Picture) -> Tensor:
        """Undo the order of windows, in which Qwen2.5-VL's tower holds its squares."""
        window_index = getattr(self.module, "get_window_index_thw", None)
        if window_index is None:
            return rows
        order, _ = window_index(*_grid(picture))
        squares = rows.view(-1, self._side**2, *rows.shape[1:])
        return squares[order.argsort().to(rows.device)].flatten(0, 1)

    def _row_by_row(self, rows: Tensor, picture: Picture) -> Tensor:
        """Return `[frames, N, ...]` of the patches `[frames * N, ...]` of an image."""
        frames, height, width = _grid(picture)
        side = self._side
        squares = rows.view(frames, height // side, width // side, side, side, *rows.shape[1:])
        return squares.transpose(2, 3).flatten(1, 4)


def _grid(picture: Picture) -> tuple[int, int, int]:
    """Return the frames of an image, and its rows and columns of patches."""
    frames, height, width = picture.inputs[f"{picture.modality}_grid_thw"][0].tolist()
    return frames, height, width
