"""The sizes of model and engine that plans and costs need; equal in every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# what an engine may be unable to do: prune visual tokens, score images in the vision tower,
# evict KV tokens, prune KV channels
Feature = Literal["visual", "importance", "kv", "channels"]
FEATURES: tuple[Feature, ...] = ("visual", "importance", "kv", "channels")


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What a plan must know of the engine.

    Attributes:
        num_layers: Decoder layers.
        boundaries: First layer of each stage, ascending, beginning with 0.
        max_num_batched_tokens: Tokens of one prompt that one scheduler step can hold.
        unsupported: Why a feature cannot be had in this engine; those left out can.
        max_model_len: Longest context, or None where nothing bounds it.
        max_num_waiting_tokens: Rows of a pruned prompt that can wait for the rest of it, or None
            where nothing bounds them.
        num_late: After each of so many first layers the model adds image features to the rows of
            their tokens (DeepStack).
        allow_channel_pruning: Whether the engine was started to prune KV channels.
        head_size: Channels of a key, and of a value, in one head.
        block_size: Slots of a KV block.
    """

    num_layers: int
    boundaries: tuple[int, ...]
    max_num_batched_tokens: int
    unsupported: Mapping[Feature, str] = field(default_factory=dict)
    max_model_len: int | None = None
    max_num_waiting_tokens: int | None = None
    num_late: int = 0
    allow_channel_pruning: bool = False
    head_size: int = 0
    block_size: int = 0

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.boundaries)

    @property
    def prune_layers(self) -> tuple[int, ...]:
        """The boundaries a user may name, which is all but the constant 0."""
        return self.boundaries[1:]

    def stage_sizes(self) -> tuple[int, ...]:
        """Number of layers of each stage."""
        ends = (*self.boundaries[1:], self.num_layers)
        return tuple(end - start for start, end in zip(self.boundaries, ends, strict=True))

    def stage_of(self, layer: int) -> int:
        """Return the stage of a layer."""
        return sum(boundary <= layer for boundary in self.boundaries) - 1

    def longest_context(self, num_prompt_tokens: int, max_tokens: int | None) -> int | None:
        """Return the most tokens a request can come to, or None where nothing bounds it."""
        if max_tokens is None:
            return self.max_model_len
        longest = num_prompt_tokens + max_tokens
        return longest if self.max_model_len is None else min(longest, self.max_model_len)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that costs need, of the whole model and not of one tensor-parallel rank.

    Attributes:
        hidden_size: `C`, the width of a hidden state.
        intermediate_size: `I`, the width of the gated MLP.
        num_heads: `HQ`, query heads.
        num_kv_heads: `H`, KV heads.
        head_size: `D`, channels of a head.
        kv_element_bytes: Bytes of one element of the KV cache.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    kv_element_bytes: int = 2

    @property
    def q_size(self) -> int:
        """Elements of one token's queries."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys, and of its values."""
        return self.num_kv_heads * self.head_size

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.kv_size * self.kv_element_bytes
