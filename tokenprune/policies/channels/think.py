"""ThinK: old keys keep the channels that weigh most in the products with recent queries.

At the end of the prompt, with the queries of its last `window` tokens and all cached keys (those
that a KV method left), the importance of channel j is

    score[j] = mean over the window of q[j]^2  *  mean over the keys of k[j]^2

the squared Frobenius norm of the channel's share of Q K^T, up to a factor that all channels have
in common. The query heads of a KV head share one choice. For values, on request,

    score[j] = || softmax(Q K^T * scale) V[:, j] ||^2     over window and query heads of a KV head

Source: Xu et al. 2024 (ThinK), arXiv 2407.21018, and SalesforceAIResearch/ThinK; values: its
appendix D. We follow the code on the form of the score, and kvpress on one choice per KV head,
which keeps what grouped queries save. The code keeps a choice per query head and a cache as wide
as if there were no groups. Sums are float32; the code's are of the model's dtype.

Not covered: a new choice when a conversation goes on; each request chooses for its own prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tokenprune.policies.base import register_policy
from tokenprune.policies.channels.base import ChannelInputs, ChannelPolicy

if TYPE_CHECKING:
    from torch import Tensor


@register_policy
class Think(ChannelPolicy):
    """Drop the key channels that matter least to the end of the prompt."""

    method: Literal["think"] = "think"

    def select_keys(self, inputs: ChannelInputs, keep: int) -> Tensor:
        """Return the top `keep` channels of each KV head."""
        from tokenprune.kernels import channel_scores, lag_keep

        # a mean over all keys is the mean of its pieces, weighted by their lengths
        total: Tensor | float = 0.0
        for keys, _ in inputs.read():
            total = total + channel_scores(inputs.queries, keys) * keys.shape[1]
        assert not isinstance(total, float), "there must be keys"
        return lag_keep(total[:, None].float(), keep)[:, 0]

    def select_values(self, inputs: ChannelInputs, keep: int) -> Tensor:
        """Return the top `keep` value channels of each KV head."""
        from tokenprune.kernels import lag_keep

        return lag_keep(value_scores(inputs)[:, None], keep)[:, 0]


def value_scores(inputs: ChannelInputs) -> Tensor:
    """Return the importance of value channels, `[H, D]` float32.

    The window's own keys are the last ones, so a query sees all but those after its own; one that
    sees none contributes nothing. The softmax is taken piece by piece, rescaled as larger logits
    are found.
    """
    import torch

    window = inputs.queries.shape[1]
    mixed = inputs.queries.new_zeros((), dtype=torch.float32)
    total, highest = mixed, mixed - torch.inf
    begin = 0
    for keys, values in inputs.read():
        heads, n, size = keys.shape
        queries = inputs.queries.float().reshape(heads, -1, size) * inputs.scale  # [H, G * W, D]
        logits = queries @ keys.float().transpose(1, 2)
        # key begin + i is hidden from query t if it comes after key num_keys - window + t
        last = torch.arange(window, device=keys.device) + inputs.num_keys - window - begin
        hidden = torch.arange(n, device=keys.device) > last[:, None]
        hidden = hidden.repeat(logits.shape[1] // window, 1)
        logits = logits.masked_fill(hidden, -torch.inf)
        # finite, so that a piece that a query does not see adds nothing
        higher = torch.maximum(highest, logits.amax(-1, keepdim=True)).clamp(min=-1e38)
        shrink = torch.exp(highest - higher)
        weights = torch.exp(logits - higher)
        mixed = mixed * shrink + weights @ values.float()
        total = total * shrink + weights.sum(-1, keepdim=True)
        highest, begin = higher, begin + n
    # 0 by 0 where a query of a window longer than the cache sees no key
    return torch.where(total > 0, mixed / total, 0.0).square().sum(1)
