"""A plain transformers loop in float64 that drops the same visual rows and KV: the engine's oracle.

Nothing in this room is shared with the product but the plan's integers (kept counts and known
ranks). Scores are written out again from the formulas of the papers and their released code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.oracle.channels import Thinned, settled
from tests.oracle.checkpoint import Checkpoint, Picture
from tests.oracle.formulas import attention_weights, best, rotate_half
from tests.oracle.kv import Evicted
from tests.oracle.visual import Pruned, choose_from, mix, ttv


@dataclass
class Trace:
    """What the oracle did: log-probs of each generated token, and the kept ranks per cut."""

    logprobs: list[Tensor] = field(default_factory=list)
    kept: dict[int, list[int]] = field(default_factory=dict)


class Oracle(Checkpoint):
    """One checkpoint, run layer by layer."""

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
            hidden, ranks = choose_from(self, images, hidden, visual, pruned.images)
            pruned = replace(pruned, ranks=ranks)
        positions, late = self.positions(len(hidden)), self.late_rows()
        first_free = int(positions.max()) + 1
        ranks = torch.arange(int(visual.sum()))
        num_text_after = len(hidden) - 1 - int(visual.nonzero()[-1]) if visual.any() else 0
        total = torch.zeros(len(ranks), dtype=torch.float64)
        cache: list[tuple[Tensor, Tensor]] = []
        for index, layer in enumerate(self.decoder.layers):
            keep = pruned.cuts.get(index)
            if keep is not None and keep < len(ranks):
                if pruned.ranks is not None:
                    chosen = torch.isin(ranks, torch.tensor(pruned.ranks[index])).nonzero()[:, 0]
                else:
                    iga = self._iga(layer, hidden, positions, visual, num_text_after)
                    chosen = best(mix(total, iga, pruned), keep)
                alive = ~visual
                alive[visual.nonzero()[chosen, 0]] = True
                ranks, total = ranks[chosen], total[chosen]
                trace.kept[index] = ranks.tolist()
                hidden, positions, visual = hidden[alive], positions[..., alive], visual[alive]
            hidden, parts, kv, q = self._layer(layer, hidden, positions, None)
            if index < len(late):
                hidden[visual] += late[index][ranks]
            kv = kv if evicted is None else evicted.cut(index, *kv)
            if thinned is not None:
                thinned.choose(index, q, *kv)
                kv = thinned.thin(index, *kv, settled(index, kv, evicted, thinned))
            cache.append(kv)
            if index in pruned.observed:
                for x_in, x_out in parts:
                    total = total + ttv(x_in, x_out, visual, pruned.form)
        trace.logprobs.append(self._logprobs(hidden[-1]))
        self._generate(trace, first_free, generated, cache, evicted, thinned)
        return trace

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
        first_free: int,
        generated: list[int],
        cache: list[tuple[Tensor, Tensor]],
        evicted: Evicted | None,
        thinned: Thinned | None = None,
    ) -> None:
        for step, token in enumerate(generated[:-1]):
            hidden = self.decoder.embed_tokens(torch.tensor([token]))
            position = torch.tensor([first_free + step])
            for index, layer in enumerate(self.decoder.layers):
                hidden, _, kv, _ = self._layer(layer, hidden, position, cache[index])
                kv = kv if evicted is None else evicted.cut(index, *kv)
                if thinned is not None and thinned.generated:
                    kv = thinned.thin(index, *kv, settled(index, kv, evicted, thinned))
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
        batch = positions[None] if positions.ndim == 1 else positions[:, None]
        cos, sin = self.decoder.rotary_emb(x[None], batch)
        cos, sin = cos[0, :, None], sin[0, :, None]
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v

    def _layer(
        self, layer: object, hidden: Tensor, positions: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor], Tensor]:
        attn_in = layer.input_layernorm(hidden)
        q, k, v = self._qkv(layer, attn_in, positions)
        if past is not None:
            k, v = torch.cat([past[0], k]), torch.cat([past[1], v])
        probs = attention_weights(q, k, True)
        group = q.shape[1] // v.shape[1]
        mixed = torch.einsum("hqk,khd->qhd", probs, v.repeat_interleave(group, dim=1))
        attn_out = layer.self_attn.o_proj(mixed.flatten(1))
        hidden = hidden + attn_out
        mlp_in = layer.post_attention_layernorm(hidden)
        # mixtures of experts take batches only
        mlp_out = layer.mlp(mlp_in[None])[0]
        return hidden + mlp_out, [(attn_in, attn_out), (mlp_in, mlp_out)], (k, v), q

    def _iga(
        self, layer: object, hidden: Tensor, positions: Tensor, visual: Tensor, num_text: int
    ) -> Tensor:
        q, k, _ = self._qkv(layer, layer.input_layernorm(hidden), positions)
        return attention_weights(q, k, True)[:, -num_text:].mean(dim=(0, 1))[visual]
