"""What the HTTP side knows of its engine."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.request import Axes
from tokenprune.shape import EngineShape, ModelShape


@dataclass(frozen=True, slots=True)
class Service:
    """What requests are read and answered by; lies in `app.state.tokenprune`.

    Attributes:
        engine: What plans need.
        model: What costs need.
        default: Applied to requests that say nothing about pruning.
    """

    engine: EngineShape
    model: ModelShape
    default: Axes
