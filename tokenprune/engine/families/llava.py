"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision.

A square tower (CLIP with a class token, or SigLIP) sees crops of one size. One crop of the whole
picture, or that and tiles of a grid, put together, unpadded and resized, with a line break after
each row; frames of a video are pooled. The decoder takes one-dimensional positions.
"""

from __future__ import annotations

import math
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

# vision towers that can be scored, and the features that leave out their class token
_TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
# vLLM pools the frames of a video, and resizes tiles beyond this many crops, by these constants
VIDEO_STRIDE = 2
MAX_CROPS = 9


class Llava(Family):
    """LLaVA with a CLIP or SigLIP tower."""

    name: ClassVar[str] = "LLaVA"
    architectures: ClassVar[tuple[str, ...]] = (
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
    )
    decoders: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    towers: ClassVar[tuple[str, ...]] = tuple(_TOWERS)

    def importance_unsupported(self, vllm_config: VllmConfig) -> str | None:
        """Return why the patches of images cannot be scored, or None."""
        config = vllm_config.model_config.hf_config
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if tower not in _TOWERS:
            return f"vision tower type {tower!r} is not among {', '.join(_TOWERS)}"
        if strategy != _TOWERS[tower]:
            return (
                f"the vision tower's features are selected by {strategy!r} instead of "
                f"{_TOWERS[tower]!r}"
            )
        if not isinstance(config.vision_feature_layer, int):
            return "features are taken from several layers of the vision tower"
        return None

    def tower(self, vllm_config: VllmConfig, model: Any) -> Tower:
        """Find the tower, which vLLM builds up to the layer whose output is used."""
        return LlavaTower(vllm_config, model)


class LlavaTower(Tower):
    """A CLIP or SigLIP tower."""

    def __init__(self, vllm_config: VllmConfig, model: Any) -> None:
        self._model_config = vllm_config.model_config
        self._config = vllm_config.model_config.hf_config
        vision = self._config.vision_config
        self.patch = int(vision.patch_size)
        self._side = int(vision.image_size) // self.patch
        self.module = model.vision_tower
        self.attention: Any = model.vision_tower.vision_model.encoder.layers[-1].self_attn.attn
        self.scale = float(self.attention.scale)

    def heads(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], picture: Picture
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys; they come as `[crops, rows, H * D]`."""
        query, key = args[0], args[1]
        # a class token stands in front
        patches = slice(query.shape[1] - self._side**2, None)
        query, key = (
            x[:, patches].unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2)
            for x in (query, key)
        )
        return query, key

    def pixels(self, args: Sequence[Any], crop: int, picture: Picture) -> Tensor:
        """Undo the processor's normalisation."""
        return before_normalisation(self._model_config, args[0][crop], picture.modality)

    def lay_out(self, scores: Tensor, picture: Picture) -> ImageScores:
        """Lay scores out by what the model does with features."""
        if picture.modality == "video":
            return _video_scores(scores, self._side)
        if "image_sizes" in picture.inputs:
            size = picture.inputs["image_sizes"][0].tolist()
            return _tiled_scores(scores, self._side, size, self._config)
        return ImageScores(scores[0], ((scores.shape[1], self._side),), False)


def _tiled_scores(scores: Tensor, side: int, size: list[int], config: Any) -> ImageScores:
    """Lay scores `[crops, side * side]` out as LLaVA-NeXT and OneVision lay out features."""
    import torch
    from torch.nn.functional import interpolate, pad
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        unpad_image,
    )

    base = scores[0]
    if len(scores) == 1:
        newline = base.new_full((1,), math.inf)
        return ImageScores(torch.cat([base, newline]), ((len(base), side), (1, 1)), False)
    rows, columns = get_anyres_image_grid_shape(
        tuple(size), config.image_grid_pinpoints, config.vision_config.image_size
    )
    tiles = scores[1 : 1 + rows * columns].view(rows, columns, side, side)
    tiles = tiles.transpose(1, 2).reshape(1, rows * side, columns * side)
    tiles = unpad_image(tiles, tuple(size))
    height, width = tiles.shape[1:]
    ratio = math.sqrt(height * width / (MAX_CROPS * side**2))
    if config.model_type == "llava_onevision" and ratio > 1.1:
        tiles = interpolate(
            tiles[None], [int(height // ratio), int(width // ratio)], mode="bilinear"
        )[0]
    # a line break after each row
    tiles = pad(tiles[0], (0, 1), value=math.inf)
    grids = ((len(base), side), (tiles.numel(), tiles.shape[1]))
    return ImageScores(torch.cat([base, tiles.flatten()]), grids, False)


def _video_scores(scores: Tensor, side: int) -> ImageScores:
    """Lay scores `[frames, side * side]` out as LLaVA-OneVision lays out frames."""
    import torch
    from torch.nn.functional import interpolate

    pooled = math.ceil(side / VIDEO_STRIDE)
    frames = interpolate(scores.view(-1, 1, side, side), size=[pooled, pooled], mode="bilinear")
    newline = scores.new_full((1,), math.inf)
    grids = ((frames.numel(), pooled), (1, 1))
    return ImageScores(torch.cat([frames.flatten(), newline]), grids, True)
