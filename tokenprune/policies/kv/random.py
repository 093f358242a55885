"""Random: keep a seeded random subset of each partition. The floor every KV method must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tokenprune.policies.base import MAX_SEED, register_policy
from tokenprune.policies.kv.base import KVPolicy, Segments

if TYPE_CHECKING:
    from torch import Tensor


@register_policy
class RandomKV(KVPolicy):
    """Keep a random subset of each partition, drawn for each layer and KV head.

    The draw depends on `seed`, layer, head and partition alone, so a repeated or preempted
    request keeps the same tokens. Tensor-parallel ranks count their heads from 0 each.
    """

    is_baseline: ClassVar[bool] = True

    method: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="Seed of the draw.")

    def score(self, segments: Segments) -> Tensor:
        """Return the draw of each token."""
        import torch

        count = segments.num_partitions * segments.lag
        tokens = torch.arange(count) + segments.first * segments.lag
        heads = torch.arange(segments.num_heads) + segments.layer * segments.num_heads
        draws = _mix(_mix(_mix(heads, self.seed)[:, None], 1) ^ tokens, 2)
        shape = (segments.num_heads, segments.num_partitions, segments.lag)
        # 24 bits are exact in float32
        return (draws & 0xFFFFFF).float().view(shape).to(segments.device)


def _mix(x: Tensor, salt: int) -> Tensor:
    """Return 32 well-mixed bits of each element; the finaliser of MurmurHash3, in int64."""
    x = (x + (salt * 0x9E3779B9 & 0xFFFFFFFF)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
