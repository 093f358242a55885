"""TransPrune's schedule of cuts, which the baselines share."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from tokenprune.errors import shown
from tokenprune.policies.visual.base import Cuts, VisualPolicy
from tokenprune.shape import EngineShape

# an engine has at most as many KV cache groups, and each stage takes one at least
MAX_CUTS = 12


class ScheduledPolicy(VisualPolicy):
    """A visual method with TransPrune's schedule of cuts, whichever way it chooses.

    Baselines share it, so equal `keep_ratio` means equal work and only the choice differs.
    """

    # TransPrune's published schedule, "High" (arXiv 2507.20630: cuts after layers 7, 9, 12 of
    # 32)
    published_depth: ClassVar[int] = 32
    published_layers: ClassVar[tuple[int, ...]] = (7, 9, 12)
    published_ratios: ClassVar[tuple[float, ...]] = (0.875, 0.625, 0.125)

    keep_ratio: float = Field(
        default=0.125,
        gt=0,
        le=1,
        description="Share of the visual tokens that survives the last cut; earlier cuts follow "
        "the published proportions. 1 keeps everything.",
    )
    prune_layers: list[int] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_CUTS,
        description="Layers to cut before; each must be a stage boundary of the engine. "
        "Default: the published layers, scaled to the model and snapped to boundaries.",
    )
    keep_ratios: list[float] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_CUTS,
        description="Share of the original visual tokens kept at each cut, not increasing, one "
        "for each of `prune_layers`. Replaces `keep_ratio`.",
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> ScheduledPolicy:
        layers, ratios = self.prune_layers, self.keep_ratios
        if layers is not None and layers != sorted(set(layers)):
            raise ValueError(f"prune_layers must ascend without repeats, got {shown(layers)}")
        if ratios is None:
            return self
        if "keep_ratio" in self.model_fields_set:
            raise ValueError("keep_ratio and keep_ratios exclude each other; leave one out")
        if any(not 0 < r <= 1 for r in ratios):
            raise ValueError(f"keep_ratios must each be in (0, 1], got {shown(ratios)}")
        if ratios != sorted(ratios, reverse=True):
            raise ValueError(f"keep_ratios must not increase, got {shown(ratios)}")
        wanted = len(self.published_layers if layers is None else layers)
        if len(ratios) != wanted:
            raise ValueError(f"keep_ratios must have {wanted} values, got {len(ratios)}")
        return self

    def cuts(self, engine: EngineShape) -> Cuts:
        """Return `(layer, keep ratio)` of each cut, on the engine's boundaries.

        Raises:
            PolicyError: A layer of `prune_layers` is no boundary, or the engine has none.
        """
        published = (p / self.published_depth for p in self.published_layers)
        layers = self.snapped(engine, self.prune_layers, published)
        # where two published cuts snap to one boundary the later, deeper one holds
        return tuple(dict(zip(layers, self._ratios(len(layers)), strict=True)).items())

    def _ratios(self, num_cuts: int) -> tuple[float, ...]:
        if self.keep_ratios is not None:
            return tuple(self.keep_ratios)
        if self.prune_layers is None:
            last = self.published_ratios[-1]
            shape = [(1 - r) / (1 - last) for r in self.published_ratios]
        else:
            shape = [(i + 1) / num_cuts for i in range(num_cuts)]
        # the last cut is exact: 1 - (1 - r) is not always r in floating point
        early = (1 - (1 - self.keep_ratio) * share for share in shape[:-1])
        return (*early, self.keep_ratio)
