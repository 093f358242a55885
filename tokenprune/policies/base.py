"""What a policy is: `plan` counts in integers, `select` chooses in tensors.

`plan` is pure and torch-free, so the API process, the scheduler and the worker each make the
same plan from the same request. `select` runs in the worker only. How many survive never
depends on data; which survive may.

Ties, for every method: the higher score first, then the lower index; kept indices ascend.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

Axis = Literal["visual", "kv", "channels"]


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What a plan must know of the engine; equal in every process.

    Attributes:
        num_layers: Decoder layers.
        boundaries: First layer of each stage, ascending, beginning with 0.
        max_num_batched_tokens: Tokens one scheduler step can hold.
        unsupported: Why visual tokens cannot be pruned in this model, or None.
        kv_unsupported: Why KV tokens cannot be evicted in this engine, or None.
        max_model_len: Longest context, or None where nothing bounds it.
        importance_unsupported: Why patches cannot be scored in this model's vision tower, or None.
        allow_channels: Whether the engine was started to prune KV channels.
        channels_unsupported: Why KV channels cannot be pruned in this engine, or None.
        head_size: Channels of a key, and of a value, in one head.
        block_size: Slots of a KV block.
    """

    num_layers: int
    boundaries: tuple[int, ...]
    max_num_batched_tokens: int
    unsupported: str | None = None
    kv_unsupported: str | None = None
    max_model_len: int | None = None
    importance_unsupported: str | None = None
    allow_channels: bool = False
    channels_unsupported: str | None = None
    head_size: int = 0
    block_size: int = 0

    @property
    def prune_layers(self) -> tuple[int, ...]:
        """The boundaries a user may name, which is all but the constant 0."""
        return self.boundaries[1:]

    def stage_sizes(self) -> tuple[int, ...]:
        """Number of layers of each stage."""
        ends = (*self.boundaries[1:], self.num_layers)
        return tuple(end - start for start, end in zip(self.boundaries, ends, strict=True))

    def longest_context(self, num_prompt_tokens: int, max_tokens: int | None) -> int | None:
        """Return the most tokens a request can come to, or None where nothing bounds it."""
        if max_tokens is None:
            return self.max_model_len
        longest = num_prompt_tokens + max_tokens
        return longest if self.max_model_len is None else min(longest, self.max_model_len)


class PlanSkipped(Exception):
    """The request is served unpruned on this axis; `reason` is a label of the fallback metric."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Policy(BaseModel, abc.ABC):
    """A named method with its parameters; immutable once made.

    Attributes:
        axis: What it prunes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    axis: ClassVar[Axis]

    @property
    def name(self) -> str:
        """The method's name, which is the one value of its `method` field."""
        return _name(type(self))


def _name(cls: type[Policy]) -> str:
    return str(cls.model_fields["method"].default)


PolicyT = TypeVar("PolicyT", bound=Policy)
_registry: dict[tuple[Axis, str], type[Policy]] = {}


def register_policy(cls: type[PolicyT]) -> type[PolicyT]:
    """Add a policy to the registry under its axis and the one value of its `method` field."""
    method = _name(cls)
    if (cls.axis, method) in _registry:
        raise ValueError(f"{cls.axis} method {method!r} is already registered")
    _registry[cls.axis, method] = cls
    return cls


def policies(axis: str) -> dict[str, type[Policy]]:
    """Registered policies of one axis by method name, sorted."""
    return {name: cls for (a, name), cls in sorted(_registry.items()) if a == axis}
