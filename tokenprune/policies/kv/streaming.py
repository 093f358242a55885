"""Streaming: keep the sink and the newest tokens. The baseline that needs no score.

Source: the window of Xiao et al. 2024 (StreamingLLM), arXiv 2309.17453, with two differences:
positions are not renumbered, and the window holds as many tokens as LagKV would with the same
parameters, so it grows with the context instead of staying fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tokenprune.policies.base import register_policy
from tokenprune.policies.kv.base import KVPolicy, Segments

if TYPE_CHECKING:
    from torch import Tensor


@register_policy
class Streaming(KVPolicy):
    """Keep the sink and the newest tokens, as many as `lagkv` keeps with these parameters."""

    is_baseline: ClassVar[bool] = True
    keeps_newest: ClassVar[bool] = True

    method: Literal["streaming"] = "streaming"

    def score(self, segments: Segments) -> Tensor:
        """Return the place of each token: the newer, the higher."""
        import torch

        count = segments.num_partitions * segments.lag
        places = torch.arange(count, device=segments.device) + segments.first * segments.lag
        return places.float().view(1, -1, segments.lag).expand(segments.num_heads, -1, -1)
