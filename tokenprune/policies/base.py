"""What every policy is: a named method with its parameters, registered under its axis.

A policy plans in integers and chooses in tensors. `plan` is pure and torch-free, so the API
process, the scheduler and the worker each make the same plan from the same request; the choice
is made in the worker only. How many survive never depends on data; which survive may.

Ties, for every method: the higher score first, then the lower index; kept indices ascend.
"""

from __future__ import annotations

import abc
import inspect
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from tokenprune.shape import EngineShape

Axis = Literal["visual", "kv", "channels"]
# bounds of parameters that no model gives a bound: any seed a user would write, and more tokens
# than any context has
MAX_SEED = 2**63 - 1
MAX_TOKENS = 2**31 - 1
AXES: tuple[Axis, ...] = ("visual", "kv", "channels")


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why an axis that was asked for is not applied.

    Attributes:
        reason: A label of the fallback metric.
        message: What a request that asked for it itself is refused with; None where it is served
            all the same, because there is simply nothing to prune.
        param: Dotted path of the key that `message` is about.
    """

    reason: str
    message: str | None = None
    param: str = "pruning"


class PlanSkipped(Exception):
    """The request is served unpruned on this axis, or refused if it asked for it itself.

    Attributes:
        skipped: Why.
    """

    def __init__(self, reason: str, message: str | None = None, param: str = "pruning") -> None:
        super().__init__(reason)
        self.skipped = Skipped(reason, message, param)


class Policy(BaseModel, abc.ABC):
    """A named method with its parameters; immutable once made.

    Attributes:
        axis: What it prunes.
        is_baseline: Whether it is there to be compared with: it looks at no data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    axis: ClassVar[Axis]
    is_baseline: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The method's name, which is the one value of its `method` field."""
        return _name(type(self))

    def _check_engine(self, engine: EngineShape) -> None:
        """Skip the axis where the engine lacks it.

        Raises:
            PlanSkipped: It does; the message says why.
        """
        unsupported = engine.unsupported.get(self.axis)
        if unsupported is not None:
            raise PlanSkipped(
                "model_unsupported",
                f"pruning.{self.axis} must be left out with this server: {unsupported}",
                f"pruning.{self.axis}",
            )


def _name(cls: type[Policy]) -> str:
    return str(cls.model_fields["method"].default)


PolicyT = TypeVar("PolicyT", bound=Policy)
_registry: dict[tuple[Axis, str], type[Policy]] = {}


def register_policy(cls: type[PolicyT]) -> type[PolicyT]:
    """Add a policy to the registry under its axis and the one value of its `method` field.

    Raises:
        TypeError: The class lacks a method that its base leaves to it, or has no `method` field.
        ValueError: The axis has a method of that name already.
    """
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(f"policy {cls.__name__} must define {missing}, got a class without")
    if "method" not in cls.model_fields:
        raise TypeError(f"policy {cls.__name__} must have a field method, got none")
    method = _name(cls)
    if (cls.axis, method) in _registry:
        raise ValueError(f"{cls.axis} method {method!r} is already registered")
    _registry[cls.axis, method] = cls
    return cls


def methods(axis: str) -> dict[str, type[Policy]]:
    """Registered policies of one axis by method name, sorted."""
    return {name: cls for (a, name), cls in sorted(_registry.items()) if a == axis}
