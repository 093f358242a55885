"""The plan of a request: each axis brings its part, and the physical lengths follow from all.

Pure and torch-free: the API process, the scheduler and the worker make the same plan from the
same request, without a message between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tokenprune.errors import PolicyError
from tokenprune.lengths import MANY, PhysicalLengths, PromptLayout
from tokenprune.policies import (
    AXES,
    AfterPrompt,
    Axis,
    ChannelPlan,
    ChannelPolicy,
    KVPlan,
    KVPolicy,
    PlanSkipped,
    Skipped,
    VisualPlan,
    VisualPolicy,
)
from tokenprune.request import OFF, Axes
from tokenprune.shape import EngineShape

DEFAULT_REFUSED = "default_refused"


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """What happens to one request.

    Attributes:
        lengths: Physical lengths; those of an unpruned request where no axis is applied.
        pruning: What was asked for.
        visual: The part of the visual axis, or None.
        kv: The part of the KV axis, or None.
        channels: The part of the channel axis, or None.
        skipped: Why an axis that was asked for is not applied.
    """

    lengths: PhysicalLengths
    pruning: Axes = OFF
    visual: VisualPlan | None = None
    kv: KVPlan | None = None
    channels: ChannelPlan | None = None
    skipped: Mapping[Axis, Skipped] = field(default_factory=dict)

    def part(self, axis: Axis) -> VisualPlan | KVPlan | ChannelPlan | None:
        """Return the part of an axis, or None where it is not applied."""
        return {"visual": self.visual, "kv": self.kv, "channels": self.channels}[axis]

    @property
    def is_pruned(self) -> bool:
        """True when at least one axis is applied."""
        return any(self.part(axis) is not None for axis in AXES)

    def waiting_rows(self, num_computed: int) -> int:
        """Return the rows that wait for the prompt once `num_computed` tokens are computed."""
        visual = self.visual
        return visual.waiting_rows(num_computed) if isinstance(visual, AfterPrompt) else 0

    @property
    def query_window(self) -> int:
        """Last prompt rows whose queries a method looks at; 0 for none."""
        kv = self.kv.policy.query_window if self.kv is not None else 0
        return max(kv, self.channels.policy.window if self.channels is not None else 0)

    @property
    def shared_tokens(self) -> int:
        """First tokens whose KV is that of an unpruned request until some is evicted or packed."""
        return MANY if self.visual is None else self.visual.shared_tokens

    @property
    def longest_hit(self) -> int:
        """Most tokens that a prefix cache may bring, with all that is chosen later still the same.

        All of them are held whole: as many slots at every stage as there are tokens.
        """
        longest = min(self.shared_tokens, self.lengths.whole_until)
        if self.query_window == 0:
            return longest
        # queries of cached tokens are kept nowhere
        prompt = self.lengths.num_prompt_tokens
        return max(0, min(longest, min(self.lengths.all_written(prompt)) - self.query_window))

    def refuse_what_is_skipped(self) -> None:
        """Refuse what a request asked for itself and this server cannot do.

        Raises:
            PolicyError: With the message of the first such axis.
        """
        for axis in AXES:
            skipped = self.skipped.get(axis)
            if skipped is not None and skipped.message is not None:
                raise PolicyError(skipped.message, skipped.param)


def make_plan(
    pruning: Axes,
    prompt: PromptLayout,
    engine: EngineShape,
    *,
    prompt_logprobs: bool = False,
    max_tokens: int | None = None,
) -> RequestPlan:
    """Plan one request.

    Args:
        pruning: What it asked for.
        prompt: Where its visual tokens are.
        engine: What serves it.
        prompt_logprobs: Whether it also wants log-probs of the prompt; rows dropped on the way
            have none, so its visual tokens are all kept.
        max_tokens: Tokens that may be generated; None for as many as the engine allows.

    Raises:
        PolicyError: What was asked for does not fit the engine.
    """
    visual: VisualPlan | None = None
    kv: KVPlan | None = None
    channels: ChannelPlan | None = None
    skipped: dict[Axis, Skipped] = {}
    lengths = PhysicalLengths.unpruned(prompt.num_tokens, engine.num_stages)
    policy = pruning.policy("visual")
    if isinstance(policy, VisualPolicy):
        try:
            if prompt_logprobs:
                raise PlanSkipped("prompt_logprobs")
            visual = policy.plan(prompt, engine)
            lengths = replace(lengths, dropped=visual.dropped)
        except PlanSkipped as why:
            skipped["visual"] = why.skipped
    policy = pruning.policy("kv")
    if isinstance(policy, KVPolicy):
        try:
            kv = policy.plan(prompt, engine, lengths, max_tokens)
            lengths = replace(lengths, eviction=kv.eviction)
        except PlanSkipped as why:
            skipped["kv"] = why.skipped
    policy = pruning.policy("channels")
    if isinstance(policy, ChannelPolicy):
        evicting = kv.policy if kv is not None else None
        try:
            channels = policy.plan(prompt, engine, lengths, max_tokens, evicting)
            lengths = replace(lengths, packing=channels.packing)
        except PlanSkipped as why:
            skipped["channels"] = why.skipped
    return RequestPlan(lengths, pruning, visual, kv, channels, skipped)


def make_default_plan(
    pruning: Axes,
    prompt: PromptLayout,
    engine: EngineShape,
    *,
    prompt_logprobs: bool = False,
    max_tokens: int | None = None,
) -> RequestPlan:
    """Plan what the server does by default, which never refuses: what cannot be had is skipped."""
    try:
        return make_plan(
            pruning, prompt, engine, prompt_logprobs=prompt_logprobs, max_tokens=max_tokens
        )
    except PolicyError:
        asked = [axis for axis in AXES if pruning.policy(axis) is not None]
        return RequestPlan(
            PhysicalLengths.unpruned(prompt.num_tokens, engine.num_stages),
            pruning,
            skipped=dict.fromkeys(asked, Skipped(DEFAULT_REFUSED)),
        )
