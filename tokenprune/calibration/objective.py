"""The objective: how far pruning turns what the model predicts the first token from.

    score = 1/n sum over samples of cos(h_full, h_pruned)

with h the last prompt token's hidden state after the final norm. No labels are needed.

Source: VFlowOpt, arXiv 2508.05211, sec. 3.4; the paper takes the sum, which has the same maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import ConfigurationError
from tokenprune.request import OFF, Axes


class Answer(Protocol):
    """What the model made of one prompt: see `tokenprune.engine.offline_probe.LastHidden`."""

    @property
    def hidden(self) -> NDArray[np.float32]:
        """`[C]`, the last token's hidden state."""

    @property
    def num_visual(self) -> int:
        """Visual tokens of the prompt."""

    @property
    def kept(self) -> tuple[int, ...] | None:
        """Visual tokens kept per engine stage, or None where the prompt was not pruned."""


class Probe(Protocol):
    """Asks the samples' prompts."""

    def ask(self, pruning: Axes) -> Sequence[Answer]:
        """Run every prompt once."""


class Objective:
    """Scores prunings of a fixed set of prompts."""

    def __init__(self, probe: Probe, layers: Sequence[int], names: Sequence[str]) -> None:
        """Ask every prompt without pruning.

        Args:
            probe: Asks the prompts.
            layers: Number of layers of each engine stage.
            names: What to call each prompt in an error.
        """
        self._probe = probe
        self._layers = np.asarray(layers)
        self._names = names
        self._full = probe.ask(OFF)
        self.kept_share = 1.0

    def score(self, pruning: Axes) -> float:
        """Return the mean cosine; `kept_share` is then the mean share of tokens held, over layers.

        Raises:
            ConfigurationError: A prompt cannot be pruned, or a hidden state is not finite.
        """
        answers = self._probe.ask(pruning)
        cosines, shares = [], []
        for name, full, pruned in zip(self._names, self._full, answers, strict=True):
            if pruned.kept is None:
                raise ConfigurationError(
                    f"every prompt must be one that can be pruned, got {name} served whole; it "
                    "needs a picture, text after it, and to fit --max-num-batched-tokens"
                )
            cosines.append(cosine(full.hidden, pruned.hidden))
            held = float(self._layers @ np.asarray(pruned.kept)) / float(self._layers.sum())
            shares.append(held / pruned.num_visual)
        self.kept_share = float(np.mean(shares))
        score = float(np.mean(cosines))
        if not np.isfinite(score):
            worst = self._names[int(np.argmin(np.isfinite(cosines)))]
            raise ConfigurationError(f"hidden states must be finite, got {score} for {worst}")
        return score


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the cosine of the angle between two vectors `[C]`, in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
