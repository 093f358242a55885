"""Stage boundaries: the default of a depth, and those that cost too many KV cache groups."""

from __future__ import annotations

import math

from tokenprune.errors import ConfigurationError
from tokenprune.shape import EngineShape

MAX_KV_GROUPS = 12


def default_boundaries(num_layers: int) -> tuple[int, ...]:
    """Return boundaries near 1/4, 3/8 and 5/8 of the depth that make few KV cache groups.

    vLLM cuts stages into groups of equal layer count, so boundaries are multiples of a divisor
    of the depth where a suitable one exists.
    """
    divisors = [d for d in range(1, math.ceil(num_layers / 8) + 1) if num_layers % d == 0]
    step = divisors[-1]
    if num_layers // step > MAX_KV_GROUPS:
        step = max(1, round(num_layers / 8))
    layers = {
        step * max(1, math.ceil(num_layers * share / step - 0.5)) for share in (1 / 4, 3 / 8, 5 / 8)
    }
    return tuple(sorted(layer for layer in layers if layer < num_layers))


def num_kv_groups(num_layers: int, layers: tuple[int, ...]) -> int:
    """Return how many KV cache groups vLLM makes of these stages."""
    sizes = EngineShape(num_layers, (0, *layers), 0).stage_sizes()
    largest, smallest = max(sizes), min(sizes)
    # vLLM's own rule: pad to the largest stage where that wastes little
    size = largest if largest < 1.5 * smallest else smallest
    return sum(math.ceil(stage / size) for stage in sizes)


def check_boundaries(num_layers: int, layers: tuple[int, ...]) -> None:
    """Refuse boundaries that are out of range or too costly.

    Raises:
        ConfigurationError: With better boundaries, where the number of groups is the reason.
    """
    if list(layers) != sorted(set(layers)) or any(not 0 < b < num_layers for b in layers):
        raise ConfigurationError(
            f"prune_layers must ascend without repeats within 1..{num_layers - 1}, "
            f"got {list(layers)}"
        )
    groups = num_kv_groups(num_layers, layers)
    if groups > MAX_KV_GROUPS:
        raise ConfigurationError(
            f"prune_layers must make at most {MAX_KV_GROUPS} KV cache groups, got {groups} from "
            f"{list(layers)}; try {list(_near(num_layers, layers))}"
        )


def _near(num_layers: int, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return legal boundaries close to `layers`, multiples of a divisor of the depth if any."""
    for step in sorted(range(1, num_layers), key=lambda s: (num_layers % s > 0, s)):
        near = {step * max(1, round(layer / step)) for layer in layers}
        rounded = tuple(sorted(layer for layer in near if layer < num_layers))
        if rounded and num_kv_groups(num_layers, rounded) <= MAX_KV_GROUPS:
            return rounded
    return default_boundaries(num_layers)
