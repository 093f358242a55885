"""A policy that fails hurts its own request alone.

Counts are fixed before a policy is asked which tokens stay, so whatever it does, as many can be
kept as were planned: where it raises, or returns something of another shape, a choice that needs
no scores takes its place. The traceback is logged once per method, and every failure is counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from tokenprune.engine.stats import WorkerStats
from tokenprune.policies import Policy

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PolicyGuard:
    """Asks policies, and answers for those that fail.

    Args:
        stats: Where failures are counted.
    """

    def __init__(self, stats: WorkerStats) -> None:
        self._stats = stats
        self._logged: set[tuple[str, str]] = set()

    def ask(self, policy: Policy, compute: Callable[[], T], instead: Callable[[], T]) -> T:
        """Return what `compute` returns, or `instead` where it raises.

        Args:
            policy: Who is asked.
            compute: Asks it.
            instead: Makes an answer of the same kind without it.
        """
        try:
            return compute()
        # a stranger's policy may raise anything; the step must go on for all other requests
        except Exception:
            self._stats.count_failure(policy.axis, policy.name)
            name = (policy.axis, policy.name)
            if name not in self._logged:
                self._logged.add(name)
                logger.exception(
                    "%s method %s failed; tokens are chosen without it. Further failures of it "
                    "are only counted",
                    *name,
                )
            return instead()


def checked(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a policy's result, if it has the shape it must have.

    Raises:
        ValueError: It has another one.
    """
    if not isinstance(result, Tensor) or tuple(result.shape) != shape:
        found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"the result of a policy must be of shape {list(shape)}, got {found}")
    return result


def evenly(total: int, keep: int, device: torch.device) -> Tensor:
    """Return `keep` of `total` indices at even distances, int64 ascending."""
    return (2 * torch.arange(keep, device=device) + 1) * total // (2 * keep)
