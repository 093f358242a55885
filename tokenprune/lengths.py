"""Logical length to physical length, in integers: the one function all processes share.

A request with `n` computed tokens holds `P(n, stage)` slots in the KV cache of each stage of
layers. `P` is pure: the scheduler (which frees and allocates blocks), the worker (which writes
slots) and the API process (which reports usage) each compute it and must agree, without a
message between them. It depends on `n` alone, never on how the prompt was cut into chunks.

Positions are never renumbered; only the place in the cache row changes.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """Where the visual tokens of a prompt are.

    Attributes:
        num_tokens: Prompt length in tokens, placeholders included.
        visual_spans: Half-open `[start, end)` position ranges of visual tokens, ascending and
            disjoint; one or more per image.
    """

    num_tokens: int
    visual_spans: tuple[tuple[int, int], ...] = ()

    @property
    def num_visual(self) -> int:
        """Number of visual tokens in the prompt."""
        return sum(end - start for start, end in self.visual_spans)

    @property
    def num_text_after(self) -> int:
        """Number of text tokens behind the last visual token."""
        return self.num_tokens - self.visual_spans[-1][1] if self.visual_spans else 0

    def visual_positions(self) -> list[int]:
        """Prompt positions of the visual tokens, ascending."""
        return [p for start, end in self.visual_spans for p in range(start, end)]


@dataclass(frozen=True, slots=True)
class PhysicalLengths:
    """Physical lengths of one request, per stage of layers.

    Attributes:
        num_prompt_tokens: Prompt length.
        dropped: Per stage either the ascending prompt positions that the stage never holds
            (known before prefill), or their count. A count means the choice needs the whole
            prompt in one step, so it takes effect once the prompt is complete.
    """

    num_prompt_tokens: int
    dropped: tuple[tuple[int, ...] | int, ...]

    def physical(self, num_computed: int, stage: int) -> int:
        """Return the slots held at `stage` once `num_computed` tokens are computed."""
        dropped = self.dropped[stage]
        if isinstance(dropped, int):
            return num_computed - (dropped if num_computed >= self.num_prompt_tokens else 0)
        return num_computed - bisect_left(dropped, num_computed)

    def all_stages(self, num_computed: int) -> tuple[int, ...]:
        """Return the slots held at every stage once `num_computed` tokens are computed."""
        return tuple(self.physical(num_computed, s) for s in range(len(self.dropped)))
