"""The picture of a search: scores in order, and how start and best spread the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from tokenprune.calibration.search import Trial, best_of
from tokenprune.calibration.space import SearchSpace

# distinct without colour vision too (Okabe and Ito)
_GREY, _BLUE, _RED = "#999999", "#0072B2", "#D55E00"


def draw(space: SearchSpace, trials: Sequence[Trial], path: Path) -> None:
    """Write the picture as PNG.

    Args:
        space: What was searched.
        trials: All trials, in order.
        path: Where to write.
    """
    from matplotlib.figure import Figure

    start, best = trials[0], best_of(list(trials))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    scores, spread = figure.subplots(1, 2, width_ratios=(3, 2))
    values = [trial.score for trial in trials]
    scores.plot(values, "o", color=_GREY, markersize=4, label="trial")
    scores.step(
        range(len(values)), list(accumulate(values, max)), where="post", color=_BLUE, label="best"
    )
    scores.axhline(start.score, color=_RED, linestyle=":", label="start")
    scores.set(xlabel="trial", ylabel="mean cosine, pruned against full")
    scores.legend(fontsize=8)
    edges = [0, *accumulate(space.layers)]
    for trial, name, colour in ((start, "start", _RED), (best, f"best ({best.number})", _BLUE)):
        # unlike starts and ends, the areas under both are the budget
        spread.stairs(space.shares(trial.point), edges, color=colour, label=name)
    spread.axhline(space.keep_ratio, color=_GREY, linestyle=":", label="budget")
    spread.set(xlabel="layer", ylabel="share of visual tokens held", ylim=(0, 1.02))
    spread.legend(fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
