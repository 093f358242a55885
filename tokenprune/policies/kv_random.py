"""Random: keep a seeded random subset of each partition. The floor every KV method must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tokenprune.policies.base import register_policy
from tokenprune.policies.eviction import KVPolicy, PartitionInputs

if TYPE_CHECKING:
    from torch import Tensor


@register_policy
class RandomKV(KVPolicy):
    """Keep a random subset of each partition, drawn for each layer and KV head.

    The draw depends on `seed`, layer, head and partition alone, so a repeated or preempted
    request keeps the same tokens. Tensor-parallel ranks count their heads from 0 each.
    """

    method: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0, description="Seed of the draw.")

    def select(self, inputs: PartitionInputs) -> Tensor:
        """Return the tokens with the highest draws."""
        import torch

        from tokenprune.kernels import lag_keep

        tokens = torch.arange(inputs.num_partitions * inputs.lag) + inputs.first * inputs.lag
        heads = torch.arange(inputs.num_heads) + inputs.layer * inputs.num_heads
        draws = _mix(_mix(_mix(heads, self.seed)[:, None], 1) ^ tokens, 2)
        shape = (inputs.num_heads, inputs.num_partitions, inputs.lag)
        # 24 bits are exact in float32
        scores = (draws & 0xFFFFFF).float().view(shape).to(inputs.device)
        return lag_keep(scores, inputs.keep)


def _mix(x: Tensor, salt: int) -> Tensor:
    """Return 32 well-mixed bits of each element; the finaliser of MurmurHash3, in int64."""
    x = (x + (salt * 0x9E3779B9 & 0xFFFFFFFF)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
