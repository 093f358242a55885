"""Which difficulty each step trains on, decided from the accuracy of the steps before."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.tasks.data import FAMILIES, LEVELS


@dataclass
class Curriculum:
    """Current level and recent accuracy of each track; part of the training state.

    A track goes up when every family it trains reached `threshold` over one window of steps at its
    current level, or after `patience` steps there.
    """

    threshold: float
    patience: int
    levels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LEVELS, 0))
    steps_here: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LEVELS, 0))
    right: dict[str, dict[str, int]] = field(default_factory=lambda: {t: {} for t in LEVELS})
    asked: dict[str, dict[str, int]] = field(default_factory=lambda: {t: {} for t in LEVELS})

    def draw(self, seed: int, track: str, step: int) -> int:
        """Return the level of a step: mostly the current one, sometimes an easier one."""
        current = self.levels[track]
        rng = np.random.default_rng([seed, 97, list(LEVELS).index(track), step])
        return current if rng.random() < 0.75 else int(rng.integers(current + 1))

    def count(self, track: str, level: int, right: dict[str, int], asked: dict[str, int]) -> None:
        """Add the answers of one step."""
        self.steps_here[track] += 1
        if level == self.levels[track]:
            for family, number in asked.items():
                self.asked[track][family] = self.asked[track].get(family, 0) + number
                self.right[track][family] = self.right[track].get(family, 0) + right[family]

    def accuracy(self) -> dict[str, float]:
        """Return the accuracy of each family at its current level since the last `advance`."""
        return {
            family: self.right[track][family] / self.asked[track][family]
            for track in LEVELS
            for family in FAMILIES
            if self.asked[track].get(family)
        }

    def advance(self) -> None:
        """End a window: go up where it was mastered, and forget its answers."""
        accuracy = self.accuracy()
        for track, top in LEVELS.items():
            reached = [accuracy[family] for family in self.asked[track]]
            mastered = bool(reached) and min(reached) >= self.threshold
            if (mastered or self.steps_here[track] >= self.patience) and (
                self.levels[track] < top - 1
            ):
                self.levels[track] += 1
                self.steps_here[track] = 0
            self.right[track], self.asked[track] = {}, {}

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` needs."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Curriculum":
        """Rebuild from `to_dict`."""
        return cls(**record)
