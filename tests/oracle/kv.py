"""KV eviction as in arXiv 2504.04704: a cache per layer and head, cut down by the recursion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracle.formulas import best


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
        return best(term(k, next_k) + term(v, next_v), keep).tolist()

    return choose
