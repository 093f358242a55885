"""Random: keep a seeded random subset of the visual tokens. The floor every method must beat."""

from __future__ import annotations

import random
from typing import ClassVar, Literal

from pydantic import Field

from tokenprune.policies.base import MAX_SEED, register_policy
from tokenprune.policies.visual.by_rank import RankPolicy
from tokenprune.policies.visual.schedule import ScheduledPolicy


@register_policy
class RandomVisual(ScheduledPolicy, RankPolicy):
    """Keep a random subset of the surviving visual tokens at each cut.

    The draw depends on `seed` and the counts alone, so the API process, the scheduler and the
    worker draw the same set, and a repeated request keeps the same tokens.
    """

    is_baseline: ClassVar[bool] = True

    method: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="Seed of the draw.")

    def keep_ranks(self, num_visual: int, keep: int) -> list[int]:
        """Return a random subset of ranks, ascending."""
        return sorted(random.Random(f"{self.seed}/{num_visual}").sample(range(num_visual), keep))
