"""Channels dropped as in arXiv 2407.21018, by zeros in the cache of old tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracle.formulas import best
from tests.oracle.kv import Evicted


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
            keys, values = best(score, self.keys), best(value_score, self.values)
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


def settled(
    layer: int, kv: tuple[Tensor, Tensor], evicted: Evicted | None, thinned: Thinned
) -> int:
    """Return the oldest tokens that no later eviction touches and that are not recent."""
    if evicted is None:
        return len(kv[0]) - thinned.recent
    assert thinned.recent <= evicted.lag, "the newest partition must hold the recent tokens"
    done = evicted.done[layer]
    return done if done > evicted.sink else 0
