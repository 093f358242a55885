"""What a KV policy is: the shared counts of eviction, and the score that is left to a method.

*When* and *how many* are integers (`lengths.Eviction`), the same for all KV methods, so equal
parameters mean equal memory: after `sink` tokens, partitions of `lag` tokens are cut down to their
share once a whole further partition follows them. What a stage does not hold in the first place
(visual tokens dropped before it) is not counted. *Which* is a scorer: tensors in, a score for each
token and head out; the engine keeps the highest of each partition.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from tokenprune.lengths import Eviction, PhysicalLengths, PromptLayout
from tokenprune.policies.base import MAX_TOKENS, PlanSkipped, Policy
from tokenprune.shape import EngineShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# a partition that leaves the window costs a few launches in every layer, so one of a few tokens
# would slow all requests down and give hardly a block back
MIN_LAG = 16


@dataclass(frozen=True, slots=True)
class KVPlan:
    """How many KV tokens each stage keeps.

    Attributes:
        policy: Who scores them.
        eviction: When and how many.
    """

    policy: KVPolicy
    eviction: Eviction

    def summary(self) -> dict[str, str]:
        """What was applied, as the response header gives it."""
        budget = self.policy.budget_tokens
        share = (
            {"keep_ratio": f"{self.policy.keep_ratio:g}"}
            if budget is None
            else {"budget_tokens": str(budget)}
        )
        return share | {"lag": str(self.eviction.lag)}


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive partitions of one request in one layer, to be scored.

    Attributes:
        num_partitions: `P`, the partitions to cut down.
        first: Index of the first of them, counted from the sink.
        lag: Tokens of a partition.
        layer: Decoder layer, 0-based.
        num_heads: `H`, KV heads of this worker.
        device: Where the scores must be.
        keys: `[H, (P + 1) * lag, D]` the partitions and the one after them, as cached, which is
            with RoPE applied; None unless the policy `reads_cache`.
        values: The same for values.
        queries: `[HQ, W, D]` the last `W` rows of the prompt, at most `query_window` of the
            policy, RoPE applied; None where it is 0, and for evictions before the prompt ends.
        scale: What logits of queries and keys are multiplied with.
    """

    num_partitions: int
    first: int
    lag: int
    layer: int
    num_heads: int
    device: torch.device
    keys: Tensor | None = None
    values: Tensor | None = None
    queries: Tensor | None = None
    scale: float = 1.0


def cached(segments: Segments) -> tuple[Tensor, Tensor]:
    """Return keys and values, which the engine hands to every policy that `reads_cache`."""
    if segments.keys is None or segments.values is None:
        raise TypeError("segments must hold keys and values, got none; set reads_cache")
    return segments.keys, segments.values


class KVPolicy(Policy):
    """A method that evicts KV tokens of a live request, per layer and KV head.

    Every head keeps the same number of tokens, so the cache stays rectangular; which ones may
    differ by head.
    """

    axis: ClassVar[Literal["kv"]] = "kv"
    # `score` looks at the cached keys and values
    reads_cache: ClassVar[bool] = False
    # `score` looks at the queries of the prompt's last `query_window` rows
    looks_at_queries: ClassVar[bool] = False
    # the score is the place, also across partitions: the engine shifts the row and scores nothing
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
        le=MAX_TOKENS,
        description="Tokens to hold per layer once the prompt is complete, as far as the sink and "
        "the newest tokens allow. It sets the share kept of each partition, of generated tokens "
        "too, which come on top. Replaces `keep_ratio`.",
    )
    sink: int = Field(
        default=16, ge=0, le=MAX_TOKENS, description="First tokens, which are never evicted."
    )
    lag: int = Field(
        default=1024,
        ge=MIN_LAG,
        le=MAX_TOKENS,
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

    @property
    def query_window(self) -> int:
        """Last rows of the prompt whose queries a policy that `looks_at_queries` is shown."""
        return 0

    @abc.abstractmethod
    def score(self, segments: Segments) -> Tensor:
        """Return `[H, P, lag]` float32: of each partition the highest stay, ties the earlier."""

    def plan(
        self,
        prompt: PromptLayout,
        engine: EngineShape,
        lengths: PhysicalLengths | None = None,
        max_tokens: int | None = None,
    ) -> KVPlan:
        """Count what each stage keeps.

        Args:
            prompt: The prompt.
            engine: What serves it.
            lengths: Which tokens each stage holds at all; None for every one.
            max_tokens: Tokens that may be generated; None for as many as the engine allows.

        Raises:
            PlanSkipped: The context stays too short to evict from, the prompt fits the budget, or
                the engine cannot evict.
        """
        self._check_engine(engine)
        stages = range(engine.num_stages)
        if lengths is None:
            lengths = PhysicalLengths.unpruned(prompt.num_tokens, engine.num_stages)
        keep = tuple(self._keep(lengths.written(prompt.num_tokens, stage)) for stage in stages)
        eviction = Eviction(self.sink, self.lag, keep, self.when == "prompt_end")
        longest = engine.longest_context(prompt.num_tokens, max_tokens)
        if longest is not None and all(
            lengths.written(longest, stage) < eviction.first_cut_at for stage in stages
        ):
            raise PlanSkipped("context_too_short")
        if self.budget_tokens is not None and min(keep) == self.lag:
            raise PlanSkipped("within_budget")
        return KVPlan(self, eviction)

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
