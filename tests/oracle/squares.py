"""Importance of patches in towers that merge squares of them into tokens (Qwen-VL)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.oracle.checkpoint import Checkpoint, Picture
from tests.oracle.formulas import attention_weights, entropy, rotate_half

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"


def importance_of_squares(
    checkpoint: Checkpoint, picture: Picture, threshold: float, alpha: float
) -> tuple[list[float], list[tuple[int, int]]]:
    """Return the importance of the tokens of an image, or of a video's frames, and the grid."""
    tower = checkpoint.model.model.visual
    if isinstance(picture, Image.Image):
        kind, prompt, frames = "image", IMAGE, np.asarray(picture)[None]
    else:
        kind, prompt = "video", f"<|vision_start|>{VIDEO}<|vision_end|>"
        # two frames share their patches; the first of them is looked at
        frames = picture[::2]
    inputs = checkpoint.inputs(prompt, [picture])
    grid = inputs[f"{kind}_grid_thw"]
    times, height, width = grid[0].tolist()
    pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"].double()
    query, key, order = _last_attention(tower, pixels, grid)
    patch, maps = tower.config.patch_size, []
    assert frames.shape[:3] == (times, height * patch, width * patch), "it must not be resized"
    for q, k in zip(query.chunk(times), key.chunk(times), strict=True):
        probs = attention_weights(q, k, False).mean(dim=0)
        keys = probs.sum(dim=0) > threshold
        maps.append(probs[keys].sum(dim=0) if keys.any() else probs.mean(dim=0))
    tokens = torch.cat(maps).view(-1, 4).mean(dim=1)
    importance = torch.empty_like(tokens)
    importance[order] = tokens
    bits = [
        entropy(frame.transpose(2, 0, 1), patch).softmax(0).view(height // 2, 2, width // 2, 2)
        for frame in frames
    ]
    importance += alpha * torch.stack(bits).mean(dim=(2, 4)).flatten()
    return importance.tolist(), [(len(tokens), width // 2)]


@torch.inference_mode()
def _last_attention(tower: Any, pixels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys `[n, H, D]` of the last layer, and whose squares they are.

    In which order the tower holds its squares shows in what it does after its last module: an
    output row is somewhere among the merger's.
    """
    attention, seen = tower.blocks[-1].attn, {}

    def look(module: object, args: object, kwargs: dict[str, Any]) -> None:
        seen["rope"] = kwargs["position_embeddings"]

    hooks = [
        attention.register_forward_pre_hook(look, with_kwargs=True),
        attention.qkv.register_forward_hook(lambda m, a, out: seen.update(qkv=out)),
        tower.merger.register_forward_hook(lambda m, a, out: seen.update(merged=out)),
    ]
    out = tower(pixels, grid_thw=grid).pooler_output
    for hook in hooks:
        hook.remove()
    # which output each merged row becomes
    order = torch.cdist(seen["merged"], out).argmin(dim=1)
    assert torch.equal(order.sort().values, torch.arange(len(out)))
    cos, sin = (x[:, None].double() for x in seen["rope"])
    query, key, _ = seen["qkv"].unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
    return query, key, order
