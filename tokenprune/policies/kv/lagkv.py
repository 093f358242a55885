"""LagKV: evict the KV tokens that stand out least against the tokens that follow them.

A partition of `lag` tokens is scored against the next one, per layer and KV head, from cached
keys (RoPE applied) and values alone; no attention weights are needed:

    x = (Z - min) / (max - min)       min, max per channel over the next partition, Z = K or V
    s = softmax over the partition of std over the channels of x      (ddof 1)
    score = s_K + s_V

The best `int(keep_ratio * lag)` tokens of each partition stay, for good: a partition is scored
once, against its raw successor. The sink and the newest tokens are always whole.

Source: Liang et al. 2025, arXiv 2504.04704; code AI-Lab-China-Merchants-Bank/LagKV@2a9d19e, whose
schedule and defaults we follow: the selected tokens are that class's, for a prompt in one piece.

Where we leave the code: scores are float32 (the code: cache dtype, which in bfloat16 gives a
partition of 128 about 11 distinct scores); a channel constant over the next partition is left
out (the code: NaN for the whole partition); ties keep the lower index and kept tokens stay in
order (the code: descending score, which attention cannot tell apart). `kvpress.LagKVPress` has
the same scores, then ranks them and takes a global top over all partitions, prefill only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tokenprune.policies.base import register_policy
from tokenprune.policies.kv.base import KVPolicy, Segments, cached

if TYPE_CHECKING:
    from torch import Tensor


@register_policy
class LagKV(KVPolicy):
    """Keep the tokens of each partition that vary most, seen from the next partition.

    Nothing is evicted from contexts below `sink + 2 * lag` tokens.
    """

    reads_cache: ClassVar[bool] = True

    method: Literal["lagkv"] = "lagkv"

    def score(self, segments: Segments) -> Tensor:
        """Return the score of each token, seen from the next partition."""
        from tokenprune.kernels import lag_scores

        keys, values = cached(segments)
        return lag_scores(keys, values, sink=0, lag=segments.lag)
