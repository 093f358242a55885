"""Visual methods that know which tokens survive from integers alone."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from itertools import compress

from tokenprune.lengths import DroppedPositions, PromptLayout
from tokenprune.policies.visual.base import Cuts, VisualPlan, VisualPolicy, kept_per_stage
from tokenprune.shape import EngineShape


@dataclass(frozen=True, slots=True)
class KnownRows(VisualPlan):
    """Which tokens survive is known from integers alone, so the prompt may come in chunks.

    Attributes:
        ranks: Per engine stage the kept visual tokens, counted from the first visual token of
            the prompt, ascending.
        positions: Prompt positions of the visual tokens, ascending.
    """

    ranks: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]

    @property
    def dropped(self) -> tuple[DroppedPositions, ...]:
        """Per engine stage, the positions that are not kept."""
        return tuple(DroppedPositions(self._without(ranks)) for ranks in self.ranks)

    def _without(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        # in each of three processes, and a long video has tens of thousands of tokens
        if len(ranks) == len(self.positions):
            return ()
        is_dropped = bytearray(b"\x01") * len(self.positions)
        for rank in ranks:
            is_dropped[rank] = 0
        return tuple(compress(self.positions, is_dropped))

    @property
    def shared_tokens(self) -> int:
        """Those before the first visual token."""
        return self.positions[0]


class RankPolicy(VisualPolicy):
    """A visual method that chooses from integers alone."""

    @abc.abstractmethod
    def keep_ranks(self, num_visual: int, keep: int) -> list[int]:
        """Return which `keep` of `num_visual` tokens survive a cut, ascending."""

    def count(self, prompt: PromptLayout, engine: EngineShape, cuts: Cuts) -> KnownRows:
        """Return the plan, which names the tokens that survive."""
        kept = kept_per_stage(prompt.num_visual, cuts, engine)
        ranks, current = [], tuple(range(prompt.num_visual))
        for keep in kept:
            if keep < len(current):
                current = tuple(map(current.__getitem__, self.keep_ranks(len(current), keep)))
            ranks.append(current)
        return KnownRows(self, cuts, kept, tuple(ranks), tuple(prompt.visual_positions()))
