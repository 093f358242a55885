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
from itertools import islice
from typing import Self

# more tokens than any request has
MANY = 1 << 62


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """Where the visual tokens of a prompt are.

    Attributes:
        num_tokens: Prompt length in tokens, placeholders included.
        visual_spans: Half-open `[start, end)` position ranges of visual tokens, ascending and
            disjoint; one or more per image.
        spans_per_image: How many of them each image or video has, in order; empty where each has
            one.
    """

    num_tokens: int
    visual_spans: tuple[tuple[int, int], ...] = ()
    spans_per_image: tuple[int, ...] = ()

    @property
    def num_visual(self) -> int:
        """Number of visual tokens in the prompt."""
        return sum(end - start for start, end in self.visual_spans)

    @property
    def num_text_after(self) -> int:
        """Number of text tokens after the last visual token."""
        return self.num_tokens - self.visual_spans[-1][1] if self.visual_spans else 0

    def spans_of_images(self) -> list[tuple[tuple[int, int], ...]]:
        """Return the ranges of each image or video; text may stand between those of one."""
        spans = iter(self.visual_spans)
        counts = self.spans_per_image or (1,) * len(self.visual_spans)
        return [tuple(islice(spans, count)) for count in counts]

    def visual_positions(self) -> list[int]:
        """Prompt positions of the visual tokens, ascending."""
        return [p for start, end in self.visual_spans for p in range(start, end)]


@dataclass(frozen=True, slots=True)
class DroppedPositions:
    """Prompt tokens that a stage never holds, known before prefill.

    Attributes:
        positions: Their prompt positions, ascending.
    """

    positions: tuple[int, ...] = ()

    def before(self, num_computed: int) -> int:
        """Return how many of the first `num_computed` tokens are dropped."""
        return bisect_left(self.positions, num_computed)


@dataclass(frozen=True, slots=True)
class DroppedOfImages:
    """Tokens of images that a stage never holds; which ones is known before the decoder runs.

    Only counts are known in integers, so `before` holds wherever no image is cut in two.

    Attributes:
        images: `(start, end, kept)` of each image, ascending: its half-open range of positions,
            and how many of its tokens stay.
    """

    images: tuple[tuple[int, int, int], ...]

    def before(self, num_computed: int) -> int:
        """Return how many of the first `num_computed` tokens are dropped."""
        return sum(end - start - kept for start, end, kept in self.images if end <= num_computed)


@dataclass(frozen=True, slots=True)
class DroppedAfterPrompt:
    """Prompt tokens that a stage never holds; which ones is known once the prompt is complete.

    Until then rows of a stage that drops any wait, from the first one on that the choice is about.
    A stage that drops none runs with each chunk, like that of any other prompt.

    Attributes:
        count: How many.
        num_prompt_tokens: Prompt length.
        first: Position of the first token that waits; none before it is dropped.
    """

    count: int
    num_prompt_tokens: int
    first: int = 0

    @property
    def waits(self) -> bool:
        """Whether rows wait before this stage until the prompt is complete."""
        return self.count > 0

    def before(self, num_computed: int) -> int:
        """Return how many of the first `num_computed` tokens are dropped, or wait."""
        if num_computed >= self.num_prompt_tokens:
            return self.count
        return max(0, num_computed - self.first) if self.waits else 0


Dropped = DroppedPositions | DroppedOfImages | DroppedAfterPrompt


@dataclass(frozen=True, slots=True)
class Eviction:
    """How KV slots are given up while a request lives, in counts.

    After `sink` tokens the tokens of a stage form partitions of `lag`, counted in the order in
    which they were written. A partition is cut down to `keep` tokens once `lag` further tokens
    follow it, and is never touched again. So the newest `lag` to `2 * lag - 1` tokens are always
    whole, and the number of partitions cut down follows from the number of tokens alone, whether
    they came from a prompt in one piece, in chunks, or one by one.

    Attributes:
        sink: First tokens, never evicted.
        lag: Tokens of one partition.
        keep: Per stage, the tokens each cut partition keeps; `lag` keeps all of them.
        after_prompt: Evict nothing before the prompt is complete.
    """

    sink: int
    lag: int
    keep: tuple[int, ...]
    after_prompt: bool

    @property
    def first_cut_at(self) -> int:
        """Tokens with which the first partition is cut down."""
        return self.sink + 2 * self.lag


@dataclass(frozen=True, slots=True)
class Packing:
    """How tokens of a live request come to share blocks with fewer channels, in counts.

    A block has a fixed number of bytes. With all channels it holds one token per slot; once
    channels are dropped it holds more. From the end of the prompt on, the oldest tokens of a
    stage are moved into packed blocks, whole blocks only, which come first in the block table.
    A packed token is never evicted, so tokens that may still be are left alone.

    Attributes:
        block: Slots of a block.
        tokens: Tokens of a packed block, more than `block`.
        recent: Newest tokens, which keep all channels.
        generated: Pack generated tokens too, once they are old enough.
    """

    block: int
    tokens: int
    recent: int
    generated: bool


@dataclass(frozen=True, slots=True)
class PhysicalLengths:
    """Physical lengths of one request, per stage of layers.

    The physical length counts slots: a packed block is as long as any other, whatever it holds.

    Attributes:
        num_prompt_tokens: Prompt length.
        dropped: Per stage the prompt tokens that it never holds, or gives up at the prompt's end.
        eviction: What happens to the tokens a stage does hold, or None.
        packing: How those it keeps for good are packed, or None.
    """

    num_prompt_tokens: int
    dropped: tuple[Dropped, ...]
    eviction: Eviction | None = None
    packing: Packing | None = None

    @classmethod
    def unpruned(cls, num_prompt_tokens: int, num_stages: int) -> Self:
        """Return the lengths of a request that holds every token at every stage."""
        return cls(num_prompt_tokens, (DroppedPositions(),) * num_stages)

    @property
    def num_stages(self) -> int:
        """Stages of the engine."""
        return len(self.dropped)

    @property
    def first_waiting(self) -> int | None:
        """First stage before which rows wait until the prompt is complete."""
        return next((s for s in range(self.num_stages) if self._waits(s)), None)

    def _waits(self, stage: int) -> bool:
        dropped = self.dropped[stage]
        return isinstance(dropped, DroppedAfterPrompt) and dropped.waits

    @property
    def frees_blocks(self) -> bool:
        """Whether blocks may be emptied while the request lives."""
        return self.eviction is not None or self.packing is not None

    @property
    def whole_until(self) -> int:
        """Most tokens of which none is evicted or packed yet at any stage, for all that is sure."""
        firsts = [MANY]
        eviction = self.eviction
        if eviction is not None and min(eviction.keep) < eviction.lag:
            at = eviction.first_cut_at
            firsts.append(max(at, self.num_prompt_tokens) if eviction.after_prompt else at)
        if self.packing is not None:
            firsts.append(self.num_prompt_tokens)
        return min(firsts) - 1

    @property
    def rewritten_from(self) -> int:
        """First slot that is ever written again once tokens are evicted or packed."""
        # packed blocks come first in the row
        return 0 if self.packing is not None or self.eviction is None else self.eviction.sink

    def _evicted(self, num_computed: int, stage: int) -> bool:
        eviction = self.eviction
        if eviction is None or eviction.keep[stage] == eviction.lag:
            return False
        return self.partitions_cut(num_computed, stage) > 0

    def is_rewritten(self, num_computed: int, stage: int) -> bool:
        """Return whether slots of `stage` hold other tokens than at first."""
        return self._evicted(num_computed, stage) or self.packed_blocks(num_computed, stage) > 0

    def rewritten_until(self, num_computed: int, stage: int) -> int:
        """Return the slots in use once the step that first rewrites `stage` has rewritten them.

        Tokens are evicted before those that are left are packed, which then happens in place.
        """
        if self._evicted(num_computed, stage):
            return self.tokens_held(num_computed, stage)
        return self.physical(num_computed, stage)

    def written(self, num_computed: int, stage: int) -> int:
        """Return the slots written at `stage` for `num_computed` tokens, evicted ones included."""
        return num_computed - self.dropped[stage].before(num_computed)

    def partitions_cut(self, num_computed: int, stage: int) -> int:
        """Return how many partitions of `stage` are cut down after `num_computed` tokens."""
        eviction = self.eviction
        if eviction is None:
            return 0
        # tokens before those that wait are looked at once more when the prompt is complete
        whole = eviction.after_prompt or self._waits(stage)
        if whole and num_computed < self.num_prompt_tokens:
            return 0
        return max(0, (self.written(num_computed, stage) - eviction.sink) // eviction.lag - 1)

    def tokens_held(self, num_computed: int, stage: int) -> int:
        """Return the tokens held at `stage` once `num_computed` tokens are computed."""
        written = self.written(num_computed, stage)
        if self.eviction is None:
            return written
        evicted = self.eviction.lag - self.eviction.keep[stage]
        return written - self.partitions_cut(num_computed, stage) * evicted

    def packed_blocks(self, num_computed: int, stage: int) -> int:
        """Return the packed blocks of `stage` once `num_computed` tokens are computed."""
        packing = self.packing
        if packing is None or num_computed < self.num_prompt_tokens:
            return 0
        until = num_computed if packing.generated else self.num_prompt_tokens
        return self._packable(until, stage, packing.recent) // packing.tokens

    def _packable(self, num_computed: int, stage: int, recent: int) -> int:
        """Return the oldest tokens that are never evicted and have `recent` ones after them."""
        eviction = self.eviction
        if eviction is None:
            return max(0, self.tokens_held(num_computed, stage) - recent)
        # the last `lag` tokens follow the partitions cut down; where that is less than
        # `recent`, so many of those partitions must wait
        keep = eviction.keep[stage]
        waiting = -(-max(0, recent - eviction.lag) // keep)
        cut = self.partitions_cut(num_computed, stage)
        return eviction.sink + (cut - waiting) * keep if cut > waiting else 0

    def saved_by_packing(self, num_computed: int, stage: int) -> int:
        """Return how many slots fewer than tokens `stage` holds after `num_computed` tokens."""
        packing = self.packing
        if packing is None:
            return 0
        return self.packed_blocks(num_computed, stage) * (packing.tokens - packing.block)

    def physical(self, num_computed: int, stage: int) -> int:
        """Return the slots held at `stage` once `num_computed` tokens are computed."""
        held = self.tokens_held(num_computed, stage)
        return held - self.saved_by_packing(num_computed, stage)

    def peak(self, before: int, after: int, stage: int) -> int:
        """Return the slots of the step from `before` to `after` computed tokens.

        The step's tokens are appended and attended to before anything is evicted or packed.
        """
        grown = self.written(after, stage) - self.written(before, stage)
        return self.physical(before, stage) + grown

    def peak_bound(self, after: int, max_step: int, stage: int) -> int:
        """Return a bound of the peaks on the way to `after` in steps of `max_step` at most."""
        written = self.written(after, stage)
        eviction, packing = self.eviction, self.packing
        if eviction is None and packing is not None and after > self.num_prompt_tokens:
            prompt = self.written(self.num_prompt_tokens + max_step, stage)
            # a block is packed once its last token is there, so the row may just have shrunk
            unpacked = self.physical(after, stage) + packing.tokens - packing.block
            return min(written, max(prompt, unpacked + max_step))
        # a stage that waits takes what it keeps of the prompt at once
        whole = self._waits(stage) or (eviction is not None and eviction.after_prompt)
        if eviction is None or (whole and after <= self.num_prompt_tokens):
            return written
        keep = eviction.keep[stage]
        cut = self.partitions_cut(after, stage)
        settled = eviction.sink + cut * keep + 2 * eviction.lag - 1
        if whole:
            # the whole prompt is held once; steps after it start from what was settled
            prompt = self.written(self.num_prompt_tokens + max_step, stage)
            return min(written, max(prompt, settled + max_step))
        return min(written, settled + max_step)

    def all_stages(self, num_computed: int) -> tuple[int, ...]:
        """Return the slots held at every stage once `num_computed` tokens are computed."""
        return tuple(self.physical(num_computed, s) for s in range(self.num_stages))

    def all_peaks(self, before: int, after: int) -> tuple[int, ...]:
        """Return the slots of a step at every stage."""
        return tuple(self.peak(before, after, s) for s in range(self.num_stages))

    def all_written(self, num_computed: int) -> tuple[int, ...]:
        """Return the slots written at every stage for `num_computed` tokens."""
        return tuple(self.written(num_computed, s) for s in range(self.num_stages))

    def all_packed_blocks(self, num_computed: int) -> tuple[int, ...]:
        """Return the packed blocks of every stage once `num_computed` tokens are computed."""
        return tuple(self.packed_blocks(num_computed, s) for s in range(self.num_stages))
