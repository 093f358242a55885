"""What a KV policy is: the shared counts of eviction, and the choice that is left to a method.

All KV methods share one schedule (`lengths.Eviction`), so equal parameters mean equal memory and
only the choice differs: behind `sink` tokens, partitions of `lag` tokens are cut down to their
share once a whole further partition lies behind them. What a stage does not hold in the first
place (visual tokens dropped before it) is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from tokenprune.lengths import Eviction, PhysicalLengths, PromptLayout
from tokenprune.policies.base import EngineShape, PlanSkipped, Policy

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVPlan:
    """How many KV tokens each stage keeps.

    Attributes:
        keep: Tokens kept of each partition, per engine stage.
        lengths: The physical lengths that follow, dropped visual tokens included.
    """

    keep: tuple[int, ...]
    lengths: PhysicalLengths


@dataclass(frozen=True, slots=True)
class PartitionInputs:
    """Consecutive partitions of one request in one layer, to be cut down.

    Attributes:
        num_partitions: `P`, the partitions to cut down.
        first: Index of the first of them, counted from the sink.
        lag: Tokens of a partition.
        keep: Tokens to keep of each.
        layer: Decoder layer, 0-based.
        num_heads: `H`, KV heads of this worker.
        keys: `[H, (P + 1) * lag, D]` the partitions and the one behind them, as cached, which is
            with RoPE applied; None unless the policy `reads_cache`.
        values: The same for values.
        device: Where the result must be.
    """

    num_partitions: int
    first: int
    lag: int
    keep: int
    layer: int
    num_heads: int
    keys: Tensor | None
    values: Tensor | None
    device: torch.device


class KVPolicy(Policy):
    """A method that evicts KV tokens of a live request, per layer and KV head.

    Every head keeps the same number of tokens, so the cache stays rectangular; which ones may
    differ by head. Subclasses override `select`, or set `keeps_newest`.
    """

    axis: ClassVar[Literal["kv"]] = "kv"
    # `select` looks at the cached keys and values
    reads_cache: ClassVar[bool] = False
    # what lies right behind the sink goes first, so nothing is left to select
    keeps_newest: ClassVar[bool] = False

    # defaults of the released LagKV class
    keep_ratio: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of each partition that is kept, rounded down to tokens, at least one; "
        "1 keeps everything. The sink and the newest tokens come on top.",
    )
    budget_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens to hold per layer once the prompt is complete, as far as the sink and "
        "the newest tokens allow. It sets the share kept of each partition, of generated tokens "
        "too, which come on top. Replaces `keep_ratio`.",
    )
    sink: int = Field(default=16, ge=0, description="First tokens, which are never evicted.")
    lag: int = Field(
        default=1024,
        ge=1,
        description="Tokens of a partition. The newest `lag` to `2 * lag - 1` tokens are whole, "
        "and nothing is evicted from contexts below `sink + 2 * lag` tokens.",
    )
    when: Literal["prompt_end", "chunk"] = Field(
        default="prompt_end",
        description="When a prompt is evicted from: once it is complete, so that its own tokens "
        "saw everything and the result does not depend on how it was cut into chunks; or after "
        "each chunk, which bounds the memory of a long prompt. Generated tokens: always.",
    )

    @model_validator(mode="after")
    def _check_budget(self) -> KVPolicy:
        if self.budget_tokens is not None and "keep_ratio" in self.model_fields_set:
            raise ValueError("budget_tokens and keep_ratio exclude each other; leave one out")
        return self

    def plan(
        self,
        prompt: PromptLayout,
        engine: EngineShape,
        held: PhysicalLengths | None = None,
        max_tokens: int | None = None,
    ) -> KVPlan:
        """Count what each stage keeps.

        Args:
            prompt: The prompt.
            engine: What serves it.
            held: Which tokens reach each stage's cache at all; None for every one.
            max_tokens: Tokens that may be generated; None for as many as the engine allows.

        Raises:
            PlanSkipped: The context stays too short to evict from, the prompt fits the budget, or
                the engine cannot evict.
        """
        if engine.kv_unsupported is not None:
            raise PlanSkipped("model_unsupported")
        stages = range(len(engine.boundaries))
        if held is None:
            held = PhysicalLengths(prompt.num_tokens, (0,) * len(stages))
        longest = engine.longest_context(prompt.num_tokens, max_tokens)
        if longest is not None and all(
            held.entered(longest, stage) < self.sink + 2 * self.lag for stage in stages
        ):
            raise PlanSkipped("context_too_short")
        keep = tuple(self._keep(held.entered(prompt.num_tokens, stage)) for stage in stages)
        if self.budget_tokens is not None and min(keep) == self.lag:
            raise PlanSkipped("within_budget")
        eviction = Eviction(self.sink, self.lag, keep, self.when == "prompt_end")
        return KVPlan(keep, replace(held, eviction=eviction))

    def _keep(self, num_prompt: int) -> int:
        """Return what is kept of each partition at a stage that holds `num_prompt` tokens."""
        if self.budget_tokens is None:
            return max(1, int(self.keep_ratio * self.lag))
        if num_prompt <= self.budget_tokens:
            return self.lag
        cut = (num_prompt - self.sink) // self.lag - 1
        if cut < 1:
            # the window alone exceeds the budget: of what leaves it, as little as possible stays
            return 1
        return max(1, (self.budget_tokens - num_prompt + cut * self.lag) // cut)

    def select(self, inputs: PartitionInputs) -> Tensor:
        """Return which tokens of each partition are kept.

        Returns:
            `[H, P, keep]` int64, ascending within each partition.
        """
        raise NotImplementedError(f"{type(self).__name__} selects nothing")
