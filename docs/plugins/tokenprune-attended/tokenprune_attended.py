"""Attended: keep the KV tokens that the end of the prompt attends to.

    score[j] = mean over the last `window` prompt rows and the query heads of a KV head of
               softmax(q k_j * scale)

An example of a method in a package of its own. The idea is that of SnapKV (Li et al. 2024,
arXiv 2404.14469) without its pooling; counts and schedule are those of every KV method here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tokenprune.policies import KVPolicy, Segments, cached, register_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_policy
class Attended(KVPolicy):
    """Keep the tokens of each partition that the last rows of the prompt attend to."""

    reads_cache: ClassVar[bool] = True
    looks_at_queries: ClassVar[bool] = True

    method: Literal["attended"] = "attended"
    window: int = Field(
        default=16, ge=1, le=256, description="Last prompt rows whose attention counts."
    )

    @property
    def query_window(self) -> int:
        """The rows whose queries `score` is shown."""
        return self.window

    def score(self, segments: Segments) -> Tensor:
        """Return the mean attention to each token, `[H, P, lag]`."""
        import torch

        shape = (segments.num_heads, segments.num_partitions, segments.lag)
        if segments.queries is None:
            # the prompt has not ended: the newest of each partition stay
            return torch.arange(segments.lag, device=segments.device).float().expand(shape)
        keys, _ = cached(segments)
        # [H, G * W, D]: the query heads of a KV head lie next to each other
        queries = segments.queries.float().reshape(segments.num_heads, -1, keys.shape[2])
        logits = queries @ keys.float().transpose(1, 2) * segments.scale
        attention = logits.softmax(-1).mean(1)
        # the partition after the last one is there for methods that compare with it
        return attention[:, : shape[1] * shape[2]].reshape(shape)
