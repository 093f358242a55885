"""A plain transformers loop in float64 that drops the same visual rows and KV: the engine's oracle.

Nothing here is shared with the product but the plan's integers (kept counts and known ranks).
Scores are written out again from the formulas of arXiv 2507.20630 and its released code, those of
images from arXiv 2508.05211, eviction from arXiv 2504.04704: a cache per layer and head that grows
and is cut down by the recursion. Channels are dropped as in arXiv 2407.21018, by zeros in the cache
of old tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.oracle.recycling import recycled

# an image, or the frames of a video as `[frames, height, width, 3]`
Picture = Image.Image | np.ndarray


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
        if plan.images:
            kept = [dict(zip(layers, image.kept, strict=True)) for image in plan.images]
            images = FromImages(kept, policy.threshold, policy.alpha, policy.cell)
        return cls(
            cuts=dict(zip(layers, plan.kept, strict=True)),
            ranks=None
            if plan.ranks is None
            else {b: list(r) for b, r in zip(layers, plan.ranks, strict=True)},
            observed=policy.observed_layers(engine),
            form=getattr(policy, "form", "code"),
            alpha=getattr(policy, "alpha", 0.5),
            images=images,
        )


@dataclass
class Evicted:
    """How to evict KV: the recursion's parameters, and what chooses.

    Attributes:
        choose: Returns the kept ranks of a partition from its keys and values and those of the
            next one, each `[lag, D]`, given layer, head and index of the partition; None keeps
            the newest tokens instead.
        chunks: Tokens of each step of the prompt, evicting after each; None for one step.
    """

    sink: int
    lag: int
    keep: int
    choose: Callable[..., list[int]] | None
    chunks: list[int] | None = None
    done: dict[int, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def cut(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is left of one layer's cache `[n, H, D]`."""
        done, lag = self.done.setdefault(layer, self.sink), self.lag
        partitions = (len(k) - done) // lag
        if partitions >= 2:
            index = [self._kept(layer, h, done, partitions, k, v) for h in range(k.shape[1])]
            k = torch.stack([k[i, h] for h, i in enumerate(index)], dim=1)
            v = torch.stack([v[i, h] for h, i in enumerate(index)], dim=1)
            self.done[layer] = done + (partitions - 1) * self.keep
        if layer == 0:
            self.lengths.append(len(k))
        return k, v

    def _kept(
        self, layer: int, head: int, done: int, partitions: int, k: Tensor, v: Tensor
    ) -> list[int]:
        if self.choose is None:
            evicted = (partitions - 1) * (self.lag - self.keep)
            return [*range(self.sink), *range(self.sink + evicted, len(k))]
        kept = list(range(done))
        for p in range(partitions - 1):
            start = done + p * self.lag
            mine = slice(start, start + self.lag)
            following = slice(start + self.lag, start + 2 * self.lag)
            number = (done - self.sink) // self.keep + p
            chosen = self.choose(
                *(k[mine, head], v[mine, head], k[following, head], v[following, head]),
                *(layer, head, number),
            )
            kept += [start + i for i in chosen]
        return [*kept, *range(done + (partitions - 1) * self.lag, len(k))]


def lag_choice(keep: int) -> Callable[..., list[int]]:
    """Return LagKV's choice of `keep` tokens."""

    def term(mine: Tensor, following: Tensor) -> Tensor:
        low, high = following.min(dim=0).values, following.max(dim=0).values
        return torch.softmax(((mine - low) / (high - low)).std(dim=1), dim=0)

    def choose(k: Tensor, v: Tensor, next_k: Tensor, next_v: Tensor, *_: int) -> list[int]:
        return _top(term(k, next_k) + term(v, next_v), keep).tolist()

    return choose


@dataclass
class Thinned:
    """How to drop channels of old tokens, which is to zero them in the cache.

    Attributes:
        keys: Channels that keys keep.
        values: Channels that values keep.
        window: Last prompt rows whose queries score.
        recent: Newest tokens that keep everything.
        tokens: Tokens that lose channels together: those of a packed block.
        generated: Whether generated tokens lose channels too.
        chosen: Per layer and head what was kept, keys then values.
        counts: Per layer how many tokens have lost channels.
    """

    keys: int
    values: int
    window: int
    recent: int
    tokens: int
    generated: bool = True
    chosen: dict[int, list[tuple[list[int], list[int]]]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def choose(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Choose channels of one layer from its queries `[n, HQ, D]` and cache `[n, H, D]`."""
        q = q[-self.window :]
        group = q.shape[1] // k.shape[1]
        self.chosen[layer] = []
        for head in range(k.shape[1]):
            mine = q[:, head * group : (head + 1) * group]
            score = mine.square().mean((0, 1)) * k[:, head].square().mean(0)
            logits = torch.einsum("tgd,nd->gtn", mine, k[:, head]) / q.shape[-1] ** 0.5
            hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
            mixed = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, head]
            value_score = mixed.square().sum((0, 1))
            keys, values = _top(score, self.keys), _top(value_score, self.values)
            self.chosen[layer].append((keys.tolist(), values.tolist()))

    def thin(self, layer: int, k: Tensor, v: Tensor, settled: int) -> tuple[Tensor, Tensor]:
        """Zero channels of whole blocks among the `settled` oldest tokens."""
        self.counts[layer] = max(0, settled) // self.tokens * self.tokens
        k, v = k.clone(), v.clone()
        for head, (keys, values) in enumerate(self.chosen[layer]):
            for cache, kept in ((k, keys), (v, values)):
                gone = [j for j in range(cache.shape[-1]) if j not in kept]
                cache[: self.counts[layer], head, gone] = 0
        return k, v


@dataclass
class Trace:
    """What the oracle did: log-probs of each generated token, and the kept ranks per cut."""

    logprobs: list[Tensor] = field(default_factory=list)
    kept: dict[int, list[int]] = field(default_factory=dict)


class Oracle:
    """One checkpoint, loaded by transformers."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.image_processor = self.processor.image_processor
        self.video_processor = getattr(self.processor, "video_processor", None)
        self.decoder = self.model.model.language_model

    @torch.inference_mode()
    def embed(self, prompt: str, images: list[Picture]) -> tuple[Tensor, Tensor]:
        """Return input embeddings `[n, C]` and the bool mask of visual rows `[n]`."""
        inputs = self._inputs(prompt, images)
        for key, value in inputs.items():
            if value.is_floating_point():
                inputs[key] = value.double()
        captured: dict[str, Tensor] = {}

        def stop(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
            captured.update(kwargs)
            raise StopIteration

        handle = self.decoder.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**inputs)
        except (StopIteration, RuntimeError):
            pass
        finally:
            handle.remove()
        config, ids = self.model.config, inputs["input_ids"][0]
        visual = ids == config.image_token_id
        if hasattr(config, "video_token_id"):
            visual |= ids == config.video_token_id
        return captured["inputs_embeds"][0], visual

    def _inputs(self, prompt: str, images: list[Picture]) -> Any:
        kinds = {
            "images": [x for x in images if isinstance(x, Image.Image)],
            "videos": [x for x in images if not isinstance(x, Image.Image)],
        }
        return self.processor(
            text=prompt, return_tensors="pt", **{k: v for k, v in kinds.items() if v}
        )

    @torch.inference_mode()
    def run(
        self,
        prompt: str,
        images: list[Picture],
        generated: list[int],
        pruned: Pruned | None = None,
        evicted: Evicted | None = None,
        thinned: Thinned | None = None,
    ) -> Trace:
        """Score `generated` token by token after `prompt`, pruning and evicting as asked."""
        if evicted is not None and evicted.chunks is not None:
            assert thinned is None, "channels of a prompt in chunks are not written down here"
            return self._run_chunks(prompt, images, generated, evicted)
        pruned = pruned or Pruned({})
        trace = Trace()
        hidden, visual = self.embed(prompt, images)
        if pruned.images is not None:
            hidden, ranks = self._choose_from(images, hidden, visual, pruned.images)
            pruned = replace(pruned, ranks=ranks)
        n = hidden.shape[0]
        positions = torch.arange(n)
        ranks = torch.arange(int(visual.sum()))
        num_text_after = n - 1 - int(visual.nonzero()[-1]) if visual.any() else 0
        total = torch.zeros(len(ranks), dtype=torch.float64)
        cache: list[tuple[Tensor, Tensor]] = []
        for index, layer in enumerate(self.decoder.layers):
            keep = pruned.cuts.get(index)
            if keep is not None and keep < len(ranks):
                if pruned.ranks is not None:
                    chosen = torch.isin(ranks, torch.tensor(pruned.ranks[index])).nonzero()[:, 0]
                else:
                    iga = self._iga(layer, hidden, positions, visual, num_text_after)
                    chosen = _top(_mix(total, iga, pruned), keep)
                alive = ~visual
                alive[visual.nonzero()[chosen, 0]] = True
                ranks, total = ranks[chosen], total[chosen]
                trace.kept[index] = ranks.tolist()
                hidden, positions, visual = hidden[alive], positions[alive], visual[alive]
            hidden, parts, kv, q = self._layer(layer, hidden, positions, None)
            kv = kv if evicted is None else evicted.cut(index, *kv)
            if thinned is not None:
                thinned.choose(index, q, *kv)
                kv = thinned.thin(index, *kv, _settled(index, kv, evicted, thinned))
            cache.append(kv)
            if index in pruned.observed:
                for x_in, x_out in parts:
                    total = total + _ttv(x_in, x_out, visual, pruned.form)
        trace.logprobs.append(self._logprobs(hidden[-1]))
        self._generate(trace, n, generated, cache, evicted, thinned)
        return trace

    def _choose_from(
        self, images: list[Picture], hidden: Tensor, visual: Tensor, how: FromImages
    ) -> tuple[Tensor, dict[int, list[int]]]:
        """Return the rows with what was folded into them, and the ranks kept at each layer."""
        hidden, done = hidden.clone(), 0
        ranks: dict[int, list[int]] = {layer: [] for layer in how.kept[0]}
        for picture, kept in zip(images, how.kept, strict=True):
            importance, grids = self.importance(picture, how.threshold, how.alpha)
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
    def importance(
        self, picture: Picture, threshold: float, alpha: float
    ) -> tuple[list[float], list[tuple[int, int]]]:
        """Return the importance of an image's tokens, infinite for line breaks, and the grids."""
        model, config = self.model.model, self.model.config
        if isinstance(picture, Image.Image):
            inputs, name = self._inputs("<image>", [picture]), "pixel_values"
            process = self.image_processor
        else:
            inputs, name = self._inputs("<video>", [picture]), "pixel_values_videos"
            process = self.video_processor
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
            probs = _probs(q, k, False).mean(dim=0)
            keys = probs.sum(dim=0) > threshold
            score = probs[keys].sum(dim=0) if keys.any() else probs.mean(dim=0)
            maps.append(score + alpha * _entropy(crop, patch, side).softmax(0))
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

    def _run_chunks(
        self, prompt: str, images: list[Picture], generated: list[int], evicted: Evicted
    ) -> Trace:
        assert evicted.chunks is not None
        embeds, _ = self.embed(prompt, images)
        cache: list[Any] = [None] * len(self.decoder.layers)
        start, trace = 0, Trace()
        for count in evicted.chunks:
            hidden = embeds[start : start + count]
            positions = torch.arange(start, start + count)
            for index, layer in enumerate(self.decoder.layers):
                hidden, _, kv, _ = self._layer(layer, hidden, positions, cache[index])
                cache[index] = evicted.cut(index, *kv)
            start += count
        assert start == len(embeds), "the chunks must be the prompt"
        trace.logprobs.append(self._logprobs(hidden[-1]))
        self._generate(trace, start, generated, cache, evicted)
        return trace

    def _generate(
        self,
        trace: Trace,
        n: int,
        generated: list[int],
        cache: list[tuple[Tensor, Tensor]],
        evicted: Evicted | None,
        thinned: Thinned | None = None,
    ) -> None:
        for step, token in enumerate(generated[:-1]):
            hidden = self.decoder.embed_tokens(torch.tensor([token]))
            position = torch.tensor([n + step])
            for index, layer in enumerate(self.decoder.layers):
                hidden, _, kv, _ = self._layer(layer, hidden, position, cache[index])
                kv = kv if evicted is None else evicted.cut(index, *kv)
                if thinned is not None and thinned.generated:
                    kv = thinned.thin(index, *kv, _settled(index, kv, evicted, thinned))
                cache[index] = kv
            trace.logprobs.append(self._logprobs(hidden[-1]))

    def _logprobs(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.decoder.norm(hidden)).log_softmax(-1)

    def _qkv(self, layer: object, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = layer.self_attn
        dim = attn.head_dim
        q, k, v = (p(x).view(len(x), -1, dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        cos, sin = self.decoder.rotary_emb(x[None], positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        return q * cos + _turn(q) * sin, k * cos + _turn(k) * sin, v

    def _layer(
        self, layer: object, hidden: Tensor, positions: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor], Tensor]:
        attn_in = layer.input_layernorm(hidden)
        q, k, v = self._qkv(layer, attn_in, positions)
        if past is not None:
            k, v = torch.cat([past[0], k]), torch.cat([past[1], v])
        probs = _probs(q, k, True)
        group = q.shape[1] // v.shape[1]
        mixed = torch.einsum("hqk,khd->qhd", probs, v.repeat_interleave(group, dim=1))
        attn_out = layer.self_attn.o_proj(mixed.flatten(1))
        hidden = hidden + attn_out
        mlp_in = layer.post_attention_layernorm(hidden)
        mlp_out = layer.mlp(mlp_in)
        return hidden + mlp_out, [(attn_in, attn_out), (mlp_in, mlp_out)], (k, v), q

    def _iga(
        self, layer: object, hidden: Tensor, positions: Tensor, visual: Tensor, num_text: int
    ) -> Tensor:
        q, k, _ = self._qkv(layer, layer.input_layernorm(hidden), positions)
        return _probs(q, k, True)[:, -num_text:].mean(dim=(0, 1))[visual]


def _settled(
    layer: int, kv: tuple[Tensor, Tensor], evicted: Evicted | None, thinned: Thinned
) -> int:
    """Return the oldest tokens that no later eviction touches and that are not recent."""
    if evicted is None:
        return len(kv[0]) - thinned.recent
    assert thinned.recent <= evicted.lag, "the newest partition must hold the recent tokens"
    done = evicted.done[layer]
    return done if done > evicted.sink else 0


def _turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def _probs(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        # the last query sees every key
        mask = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
        logits = logits.masked_fill(mask, -torch.inf)
    return logits.softmax(-1)


def _entropy(crop: np.ndarray, patch: int, side: int) -> Tensor:
    grey = crop.astype(int).sum(axis=0) // 3
    bits = []
    for top in range(0, side * patch, patch):
        for left in range(0, side * patch, patch):
            counts = Counter(grey[top : top + patch, left : left + patch].flatten().tolist())
            shares = [count / patch**2 for count in counts.values()]
            bits.append(-sum(p * math.log2(p) for p in shares))
    return torch.tensor(bits, dtype=torch.float64)


def _ttv(x_in: Tensor, x_out: Tensor, visual: Tensor, form: str) -> Tensor:
    stretch = x_out.norm(dim=1) / x_in.norm(dim=1)
    cos = (x_in * x_out).sum(1) / (x_in.norm(dim=1) * x_out.norm(dim=1))
    if form == "code":
        weight = torch.exp(1 - cos) / torch.exp(1 - cos).sum()
        return (weight * stretch)[visual]
    turn = 1 - cos[visual].abs()
    return torch.exp(turn) / torch.exp(turn).sum() * stretch[visual]


def _mix(ttv: Tensor, iga: Tensor, pruned: Pruned) -> Tensor:
    if pruned.form == "code":
        ttv, iga = ttv / (ttv.sum() + 1e-8), iga / (iga.sum() + 1e-8)
    return pruned.alpha * ttv + (1 - pruned.alpha) * iga


def _top(score: Tensor, keep: int) -> Tensor:
    order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
    return torch.tensor(sorted(order[:keep]))
