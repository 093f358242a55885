"""What is searched: shares per stage under an exact budget, and a method's other parameters.

A stage's share `c` is the share of the visual tokens that its layers hold. The budget is the mean
over layers (VFlowOpt, arXiv 2508.05211, sec. 3.3), and shares never grow again:

    keep_ratio = sum_s L_s c_s / sum_s L_s,      1 >= c_1 >= ... >= c_S > 0

Each stage but the last has one coordinate in [0, 1]: 0 is the least it can hold, which leaves all
later stages the same, and 1 the most. The last stage holds what the budget leaves. So every point
of the unit cube meets the budget, where the released code clips the last share and falls short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# the last stage keeps at least this part of `keep_ratio`: what the released code's ranges reach
_LEAST = 0.1


@dataclass(frozen=True)
class SearchSpace:
    """A method's parameters at one budget.

    Attributes:
        method: Name of the visual method.
        keep_ratio: Share of the visual tokens held, mean over layers, in (0, 1).
        layers: Number of layers of each stage.
        ranges: Least and largest value of each parameter that is searched besides the shares.
        stage_parameters: Makes the method's parameters of the shares.
        start: Where the search begins: shares, and a value for each of `ranges`.
    """

    method: str
    keep_ratio: float
    layers: tuple[int, ...]
    ranges: Mapping[str, tuple[float, float]]
    stage_parameters: Callable[[Sequence[float]], Mapping[str, Any]]
    start: tuple[tuple[float, ...], Mapping[str, float]]

    @property
    def coordinates(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of every coordinate of the search."""
        stages = {f"stage_{i + 1}": (0.0, 1.0) for i in range(len(self.layers) - 1)}
        return {**stages, **self.ranges}

    @property
    def start_point(self) -> dict[str, float]:
        """The coordinates of `start`, moved to the edge where they lie outside."""
        shares, parameters = self.start
        places = place_shares(shares, self.layers, self.keep_ratio)
        point = {f"stage_{i + 1}": place for i, place in enumerate(places)} | dict(parameters)
        return {
            name: min(max(point[name], low), high) for name, (low, high) in self.coordinates.items()
        }

    def shares(self, point: Mapping[str, float]) -> tuple[float, ...]:
        """Return the share that each stage holds at a point."""
        places = [point[f"stage_{i + 1}"] for i in range(len(self.layers) - 1)]
        return stage_shares(places, self.layers, self.keep_ratio)

    def pruning(self, point: Mapping[str, float]) -> dict[str, Any]:
        """Return the `pruning` field of a request at a point."""
        own = {name: point[name] for name in self.ranges}
        stages = self.stage_parameters(self.shares(point))
        return {"visual": {"method": self.method, **stages, **own}}


def stage_shares(
    places: Sequence[float], layers: Sequence[int], keep_ratio: float
) -> tuple[float, ...]:
    """Return shares that meet the budget.

    Args:
        places: In [0, 1], one for each stage but the last.
        layers: Number of layers of each stage, each at least 1.
        keep_ratio: The budget, in (0, 1].
    """
    shares: list[float] = []
    for place in places:
        least, most = _bounds(shares, layers, keep_ratio)
        shares.append(least + place * (most - least))
    # what is left, which rounding may put a hair above the stage before
    last = _left(shares, layers, keep_ratio) / layers[-1]
    return (*shares, min([last, *shares[-1:]]))


def place_shares(
    shares: Sequence[float], layers: Sequence[int], keep_ratio: float
) -> tuple[float, ...]:
    """Return where `stage_shares` finds shares, as near as its range allows."""
    places: list[float] = []
    found: list[float] = []
    for share in shares[:-1]:
        least, most = _bounds(found, layers, keep_ratio)
        found.append(min(max(share, least), most))
        places.append((found[-1] - least) / (most - least) if most > least else 0.0)
    return tuple(places)


def _left(shares: Sequence[float], layers: Sequence[int], keep_ratio: float) -> float:
    """Return the layer-shares that the stages after `shares` hold together."""
    spent = sum(layer * share for layer, share in zip(layers, shares, strict=False))
    return keep_ratio * sum(layers) - spent


def _bounds(
    shares: Sequence[float], layers: Sequence[int], keep_ratio: float
) -> tuple[float, float]:
    """Return the least and the most that the stage after `shares` can hold."""
    stage, left = len(shares), _left(shares, layers, keep_ratio)
    later = sum(layers[stage + 1 :])
    least = left / (layers[stage] + later)
    most = (left - _LEAST * keep_ratio * later) / layers[stage]
    ceiling = shares[-1] if shares else 1.0
    return min(least, ceiling), min(most, ceiling)
