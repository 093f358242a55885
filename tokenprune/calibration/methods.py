"""The search space of each method that can be calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tokenprune.calibration.space import SearchSpace
from tokenprune.errors import ConfigurationError
from tokenprune.policies.visual.vflowopt import VFlowOpt
from tokenprune.shape import EngineShape

# the ranges of the released code are for crops of 27 x 27 patches (SigLIP with 384 pixels)
_PATCH_GRID = 27
_THRESHOLD, _CELL, _ALPHA = (0.0, 50.0), (3.0, 24.0), (-10.0, 10.0)


def vflowopt_space(engine: EngineShape, patch_grid: int, keep_ratio: float) -> SearchSpace:
    """Return the space of `vflowopt`: stages, threshold, cell and alpha.

    The search begins at the method's own defaults for `keep_ratio`. The released code's ranges
    scale with the crop: a cell is a part of its side, and a patch can receive at most as many
    times the mean attention as there are patches.

    Args:
        engine: The engine that will serve the result.
        patch_grid: Side of the vision tower's grid of patches.
        keep_ratio: Share of the visual tokens held, mean over layers, in (0, 1).

    Raises:
        ConfigurationError: The engine's boundaries do not give each stage layers of its own.
        PolicyError: The engine has no boundaries.
    """
    policy = VFlowOpt(keep_ratio=keep_ratio)
    cuts = policy.cuts(engine)
    if len(cuts) != 3:
        raise ConfigurationError(
            f"vflowopt must cut before two layers of the decoder to be calibrated, got one from "
            f"the boundaries {list(engine.prune_layers)}; name two with --prune-layers, at about "
            f"1/3 and 2/3 of its {engine.num_layers} layers"
        )
    layers = [layer for layer, _ in cuts]
    side = patch_grid / _PATCH_GRID

    def stage_parameters(shares: Sequence[float]) -> dict[str, Any]:
        # each share of the tokens that are left
        left = [min(1.0, share / before) for before, share in pairwise((1.0, *shares))]
        return {"stages": left, "prune_layers": layers[1:]}

    return SearchSpace(
        method="vflowopt",
        keep_ratio=keep_ratio,
        layers=tuple(end - start for start, end in pairwise((*layers, engine.num_layers))),
        ranges={
            # the default must lie inside
            "threshold": (_THRESHOLD[0], max(_THRESHOLD[1] * side**2, policy.threshold)),
            "cell": (_CELL[0] * side, _CELL[1] * side),
            "alpha": _ALPHA,
        },
        stage_parameters=stage_parameters,
        start=(
            tuple(share for _, share in cuts),
            {"threshold": policy.threshold, "cell": patch_grid / 2, "alpha": policy.alpha},
        ),
    )
