"""What a channel policy is: how many tokens a packed block holds, and the choice of channels.

A block of the KV cache has room for `block_size` tokens of `2 * head_size` channels, keys and
values together. Old tokens that keep fewer channels are packed closer, so they need fewer blocks.
All counts follow from the ratios (`lengths.Packing`); which channels stay, per layer and KV head,
is chosen once, at the end of the prompt.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tokenprune.lengths import Packing, PhysicalLengths, PromptLayout
from tokenprune.policies.base import MAX_TOKENS, PlanSkipped, Policy
from tokenprune.policies.kv.base import KVPolicy
from tokenprune.shape import EngineShape

if TYPE_CHECKING:
    from torch import Tensor

# channels are kept in multiples of this, which is what matrix units take
ROUNDING = 16
# queries of a window are kept in every layer, and scored against all keys
MAX_WINDOW = 256


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """How many channels packed tokens keep.

    Attributes:
        policy: Who chooses them.
        keys: Channels kept of a key in one head.
        values: Channels kept of a value in one head.
        packing: When and how many tokens share a block.
    """

    policy: ChannelPolicy
    keys: int
    values: int
    packing: Packing

    @property
    def width(self) -> int:
        """Elements of a packed token in one head."""
        return self.keys + self.values

    def summary(self) -> dict[str, str]:
        """What was applied, as the response header gives it."""
        return {"keys": str(self.keys), "values": str(self.values)}


@dataclass(frozen=True, slots=True)
class ChannelInputs:
    """What one layer of one request shows at the end of the prompt.

    Attributes:
        queries: `[HQ, W, D]` the last `W` prompt rows, at most `window`, RoPE applied.
        num_keys: Cached keys, those of the window included, which are the last ones.
        read: Yields the cached `(keys, values)`, `[H, n, D]` each, in order and in pieces.
        scale: What logits are multiplied with.
    """

    queries: Tensor
    num_keys: int
    read: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    scale: float


class ChannelPolicy(Policy):
    """A method that drops channels of old KV tokens, per layer and KV head.

    Prefill is dense, so the first generated token is exact. Every head keeps the same number of
    channels; which ones may differ by head.
    """

    axis: ClassVar[Literal["channels"]] = "channels"

    # defaults of the released ThinK scripts, which drop 0.4
    keep_ratio: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="Share of the key channels that old tokens keep, rounded to the nearest "
        f"multiple of {ROUNDING} channels, at least {ROUNDING}. 1 keeps everything.",
    )
    values_keep_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="The same for value channels. Default: all of them.",
    )
    window: int = Field(
        default=32,
        ge=1,
        le=MAX_WINDOW,
        description="Last prompt tokens whose queries score the channels.",
    )
    recent: int = Field(
        default=32,
        ge=0,
        le=MAX_TOKENS,
        description="Newest tokens, which keep all channels. A prompt shorter than "
        "`window + recent` is not pruned.",
    )
    pack_generated: bool = Field(
        default=True,
        description="Drop the same channels of generated tokens once they are older than "
        "`recent`, a whole block at a time, so that memory grows slower.",
    )

    @abc.abstractmethod
    def select_keys(self, inputs: ChannelInputs, keep: int) -> Tensor:
        """Return the channels that keys keep, `[H, keep]` int64, ascending."""

    @abc.abstractmethod
    def select_values(self, inputs: ChannelInputs, keep: int) -> Tensor:
        """Return the channels that values keep, `[H, keep]` int64, ascending."""

    def plan(
        self,
        prompt: PromptLayout,
        engine: EngineShape,
        lengths: PhysicalLengths | None = None,
        max_tokens: int | None = None,
        evicting: KVPolicy | None = None,
    ) -> ChannelPlan:
        """Count what packed tokens keep.

        Args:
            prompt: The prompt.
            engine: What serves it.
            lengths: Which tokens each stage holds and evicts; None for every one.
            max_tokens: Tokens that may be generated; None for as many as the engine allows.
            evicting: The method that evicts tokens of this request, or None.

        Raises:
            PlanSkipped: Nothing would be saved, or the engine cannot do it.
        """
        self._check_engine(engine)
        if evicting is not None and evicting.keeps_newest:
            # it evicts the oldest tokens, which are the packed ones
            raise PlanSkipped("oldest_tokens_evicted")
        if prompt.num_tokens < self.window + self.recent:
            raise PlanSkipped("prompt_too_short")
        keys = rounded(self.keep_ratio, engine.head_size)
        values = engine.head_size
        if self.values_keep_ratio is not None:
            values = rounded(self.values_keep_ratio, engine.head_size)
        tokens = 2 * engine.head_size * engine.block_size // (keys + values)
        if tokens <= engine.block_size:
            raise PlanSkipped("no_gain")
        packing = Packing(engine.block_size, tokens, self.recent, self.pack_generated)
        if lengths is None:
            lengths = PhysicalLengths.unpruned(prompt.num_tokens, engine.num_stages)
        longest = engine.longest_context(prompt.num_tokens, max_tokens)
        packed = replace(lengths, packing=packing)
        if longest is not None and not any(packed.all_packed_blocks(longest)):
            raise PlanSkipped("context_too_short")
        return ChannelPlan(self, keys, values, packing)

    def _check_engine(self, engine: EngineShape) -> None:
        if not engine.allow_channel_pruning:
            raise PlanSkipped(
                "channels_not_allowed",
                "pruning.channels must be left out with this server; start it with "
                "--allow-channel-pruning",
                "pruning.channels",
            )
        super()._check_engine(engine)


def rounded(ratio: float, head_size: int) -> int:
    """Return a share of `head_size` channels as the nearest multiple of `ROUNDING`."""
    return min(head_size, ROUNDING * max(1, int(ratio * head_size / ROUNDING + 0.5)))
