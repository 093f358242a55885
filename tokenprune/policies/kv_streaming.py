"""Streaming: keep the sink and the newest tokens. The baseline that needs no score.

Source: the window of Xiao et al. 2024 (StreamingLLM), arXiv 2309.17453, with two differences:
positions are not renumbered, and the window holds as many tokens as LagKV would with the same
parameters, so it grows with the context instead of staying fixed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from tokenprune.policies.base import register_policy
from tokenprune.policies.eviction import KVPolicy


@register_policy
class Streaming(KVPolicy):
    """Keep the sink and the newest tokens, as many as `lagkv` keeps with these parameters."""

    keeps_newest: ClassVar[bool] = True

    method: Literal["streaming"] = "streaming"
