"""Uniform: keep visual tokens at even distances. The baseline that needs no score."""

from __future__ import annotations

from typing import ClassVar, Literal

from tokenprune.policies.base import register_policy
from tokenprune.policies.visual.by_rank import RankPolicy
from tokenprune.policies.visual.schedule import ScheduledPolicy


@register_policy
class UniformVisual(ScheduledPolicy, RankPolicy):
    """Keep every n-th of the surviving visual tokens at each cut.

    Of `N` tokens the survivors are those at `floor((i + 1/2) N / keep)`, which leaves equal
    margins at both ends. Tokens count in prompt order over all images together.
    """

    is_baseline: ClassVar[bool] = True

    method: Literal["uniform"] = "uniform"

    def keep_ranks(self, num_visual: int, keep: int) -> list[int]:
        """Return evenly spaced ranks."""
        return [(2 * i + 1) * num_visual // (2 * keep) for i in range(keep)]
