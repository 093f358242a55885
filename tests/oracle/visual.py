"""Visual rows dropped by the scores of arXiv 2507.20630 and its released code, or per image.

Scores of images are those of arXiv 2508.05211.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tests.oracle.checkpoint import Checkpoint, Picture
from tests.oracle.formulas import attention_weights, entropy
from tests.oracle.recycling import recycled
from tests.oracle.squares import importance_of_squares
from tokenprune.policies import AfterPrompt, KnownRows, PerImage


@dataclass
class FromImages:
    """How to choose from each image by itself.

    Attributes:
        kept: Per image the kept count by layer.
    """

    kept: list[dict[int, int]]
    threshold: float
    alpha: float
    cell: float | None


@dataclass
class Pruned:
    """How to prune: per cut layer the kept count, and the ranks where they are known."""

    cuts: dict[int, int]
    ranks: dict[int, list[int]] | None = None
    observed: range = range(0)
    form: str = "code"
    alpha: float = 0.5
    images: FromImages | None = None

    @classmethod
    def like(cls, policy: Any, prompt: Any, engine: Any) -> Pruned:
        """Translate a policy: counts and known ranks from its plan, scores are this file's own."""
        plan, layers = policy.plan(prompt, engine), engine.boundaries
        images = None
        if isinstance(plan, PerImage):
            kept = [dict(zip(layers, image.kept, strict=True)) for image in plan.images]
            images = FromImages(kept, policy.threshold, policy.alpha, policy.cell)
        return cls(
            cuts=dict(zip(layers, plan.kept, strict=True)),
            ranks={b: list(r) for b, r in zip(layers, plan.ranks, strict=True)}
            if isinstance(plan, KnownRows)
            else None,
            observed=policy.observed_layers(engine) if isinstance(plan, AfterPrompt) else range(0),
            form=getattr(policy, "form", "code"),
            alpha=getattr(policy, "alpha", 0.5),
            images=images,
        )


def ttv(x_in: Tensor, x_out: Tensor, visual: Tensor, form: str) -> Tensor:
    """Return how much one part of a layer turned and stretched each visual row: `[num_visual]`.

    Text before the first visual row takes no part.
    """
    first = int(visual.nonzero()[0])
    x_in, x_out, visual = x_in[first:], x_out[first:], visual[first:]
    stretch = x_out.norm(dim=1) / x_in.norm(dim=1)
    cos = (x_in * x_out).sum(1) / (x_in.norm(dim=1) * x_out.norm(dim=1))
    if form == "code":
        weight = torch.exp(1 - cos) / torch.exp(1 - cos).sum()
        return (weight * stretch)[visual]
    turn = 1 - cos[visual].abs()
    return torch.exp(turn) / torch.exp(turn).sum() * stretch[visual]


def mix(total: Tensor, iga: Tensor, pruned: Pruned) -> Tensor:
    """Return the score of visual rows from the TTV they gathered and the IGA of the cut layer."""
    if pruned.form == "code":
        total, iga = total / (total.sum() + 1e-8), iga / (iga.sum() + 1e-8)
    return pruned.alpha * total + (1 - pruned.alpha) * iga


def choose_from(
    checkpoint: Checkpoint, images: list[Picture], hidden: Tensor, visual: Tensor, how: FromImages
) -> tuple[Tensor, dict[int, list[int]]]:
    """Return the rows with what was folded into them, and the ranks kept at each layer."""
    hidden, done = hidden.clone(), 0
    ranks: dict[int, list[int]] = {layer: [] for layer in how.kept[0]}
    for picture, kept in zip(images, how.kept, strict=True):
        importance, grids = importance_of(checkpoint, picture, how.threshold, how.alpha)
        rows = visual.nonzero()[done : done + len(importance), 0]
        if isinstance(picture, Image.Image):
            cell = grids[0][1] / 2 if how.cell is None else how.cell
            left, folded = recycled(hidden[rows].tolist(), importance, grids, kept[0], cell)
            hidden[rows[left]] = hidden.new_tensor(folded)
        else:
            left = list(range(len(rows)))
        for layer in sorted(kept):
            left = sorted(sorted(left, key=lambda i: (-importance[i], i))[: kept[layer]])
            ranks[layer] += [done + i for i in left]
        done += len(importance)
    return hidden, ranks


@torch.inference_mode()
def importance_of(
    checkpoint: Checkpoint, picture: Picture, threshold: float, alpha: float
) -> tuple[list[float], list[tuple[int, int]]]:
    """Return the importance of an image's tokens, infinite for line breaks, and the grids."""
    model, config = checkpoint.model.model, checkpoint.model.config
    if hasattr(model, "visual"):
        return importance_of_squares(checkpoint, picture, threshold, alpha)
    if isinstance(picture, Image.Image):
        inputs, name = checkpoint.inputs("<image>", [picture]), "pixel_values"
        process = checkpoint.image_processor
    else:
        inputs, name = checkpoint.inputs("<video>", [picture]), "pixel_values_videos"
        process = checkpoint.video_processor
    raw = process([picture], do_normalize=False, do_rescale=False, return_tensors="pt")
    crops = inputs[name].flatten(0, -4).double()
    pixels = raw[name].flatten(0, -4).round().to(torch.uint8).numpy()
    attention = model.vision_tower.encoder.layers[config.vision_feature_layer].self_attn
    seen: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out})
        )
        for name in ("q_proj", "k_proj")
    ]
    model.vision_tower(crops)
    for hook in hooks:
        hook.remove()
    patch = config.vision_config.patch_size
    side = config.vision_config.image_size // patch
    maps = []
    for q, k, crop in zip(seen["q_proj"], seen["k_proj"], pixels, strict=True):
        q, k = (x[-(side**2) :].unflatten(1, (attention.num_heads, -1)) for x in (q, k))
        probs = attention_weights(q, k, False).mean(dim=0)
        keys = probs.sum(dim=0) > threshold
        score = probs[keys].sum(dim=0) if keys.any() else probs.mean(dim=0)
        maps.append(score + alpha * entropy(crop, patch).softmax(0))
    if name == "pixel_values_videos":
        pooled = model.apply_pooling(torch.stack(maps)[..., None]).flatten()
        return [*pooled.tolist(), math.inf], []
    if "image_sizes" not in inputs:
        return maps[0].tolist(), [(side**2, side)]
    # transformers lays out the map as if it were the features
    newline = torch.tensor([torch.inf], dtype=torch.float64)
    options = (
        {}
        if config.model_type == "llava_onevision"
        else {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    )
    packed, _ = model.pack_image_features(
        [torch.stack(maps)[..., None]],
        inputs["image_sizes"],
        image_newline=newline,
        **options,
    )
    importance = packed[0][:, 0].tolist()
    rest = importance[side**2 :]
    return importance, [(side**2, side), (len(rest), rest.index(math.inf) + 1)]
