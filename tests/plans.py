"""Plans with lengths made up by hand, for tests that do not come by a request."""

from tokenprune.lengths import (
    DroppedAfterPrompt,
    DroppedPositions,
    PhysicalLengths,
    PromptLayout,
)
from tokenprune.plan import RequestPlan
from tokenprune.policies import AfterPrompt, ChannelPlan, KnownRows, KVPlan
from tokenprune.policies.channels.think import Think
from tokenprune.policies.kv.lagkv import LagKV
from tokenprune.policies.visual.transprune import TransPrune
from tokenprune.policies.visual.uniform import UniformVisual


def lengths_of(num_prompt, dropped, eviction=None, packing=None, first=0):
    """Lengths that drop, per stage, the positions of a tuple, or a count after the prompt.

    Where it is a count, tokens from position `first` on wait for the prompt.
    """
    kinds = [
        DroppedAfterPrompt(d, num_prompt, first) if isinstance(d, int) else DroppedPositions(d)
        for d in dropped
    ]
    return PhysicalLengths(num_prompt, tuple(kinds), eviction, packing)


def is_counted(lengths):
    return any(isinstance(d, DroppedAfterPrompt) for d in lengths.dropped)


def plan_of(lengths, *, visual=True, kv=None, channels=None):
    """A request's plan with `lengths`, on the axes that bring them."""
    part = None
    if visual and is_counted(lengths):
        kept = tuple(-d.count for d in lengths.dropped)
        prompt = PromptLayout(lengths.num_prompt_tokens)
        first = next(d.first for d in lengths.dropped)
        waits = lengths.first_waiting is not None
        part = AfterPrompt(TransPrune(), (), kept, prompt, first, int(waits))
    elif visual:
        positions = tuple(range(lengths.num_prompt_tokens))
        ranks = tuple(tuple(sorted(set(positions) - set(d.positions))) for d in lengths.dropped)
        part = KnownRows(UniformVisual(), (), tuple(map(len, ranks)), ranks, positions)
    return RequestPlan(
        lengths,
        visual=part,
        kv=None if lengths.eviction is None else KVPlan(kv or LagKV(), lengths.eviction),
        channels=None
        if lengths.packing is None
        else ChannelPlan(channels or Think(), 1, 1, lengths.packing),
    )


def reasons(plan):
    """Why each axis of a plan that was asked for is not applied."""
    return {axis: skipped.reason for axis, skipped in plan.skipped.items()}
