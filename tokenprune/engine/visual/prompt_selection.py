"""A request whose visual tokens are chosen by the tensors of its whole prompt, layer by layer.

Each chunk of the prompt runs the stages before the first cut that drops any. There its rows wait,
until the last chunk brings the prompt to its end: then all of them go on together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from tokenprune.engine.guard import PolicyGuard, checked, evenly
from tokenprune.engine.visual.waiting_rows import WaitingPrompt
from tokenprune.kernels import instruction_attention
from tokenprune.policies import AfterPrompt, SelectInputs
from tokenprune.shape import EngineShape


@dataclass(slots=True)
class PromptSelection:
    """A request of the step whose policy chooses from the whole prompt.

    Attributes:
        index: Place in the batch.
        plan: How many stay.
        first_waiting: First stage that waits for the whole prompt.
        observed: Layers whose sub-modules the policy is shown.
        num_cached: Tokens of the text before the first image that earlier steps computed.
        num_before: Rows of the step that are such text; always kept.
        ends_prompt: Whether this chunk completes the prompt.
        rows_after_prompt: Rows of tokens generated before a preemption; always kept.
        guard: Asks the policy.
        waiting: What earlier chunks left.
        visual: `[rows]` bool over the request's prompt rows at the stage at work, from the first
            one on that may wait.
        num_text_first: How many of them come before the first visual one.
        num_visual: How many of them are visual.
        is_aside: Whether the rows of this chunk wait; one stands in for them.
        is_complete: Whether all rows of the prompt are there.
        terms: What the policy made of observed sub-modules until then.
        accumulated: `[num_visual]` float32 sum of the scores of observed sub-modules from then on.
    """

    index: int
    plan: AfterPrompt
    first_waiting: int
    observed: range
    num_cached: int
    num_before: int
    ends_prompt: bool
    rows_after_prompt: int
    guard: PolicyGuard
    waiting: WaitingPrompt
    visual: Tensor
    num_text_first: int
    num_visual: int
    is_aside: bool = False
    is_complete: bool = False
    terms: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    accumulated: Tensor | None = None

    @classmethod
    def of(
        cls,
        index: int,
        plan: AfterPrompt,
        first_waiting: int,
        chunk: range,
        waiting: WaitingPrompt,
        shape: EngineShape,
        device: torch.device,
        guard: PolicyGuard,
    ) -> Self:
        """Return the selection among the rows of a chunk."""
        end, first = plan.prompt.num_tokens, plan.first
        assert len(waiting.rows) == max(0, chunk.start - first), "every earlier row must wait"
        visual = _mask(plan)[max(0, chunk.start - first) : chunk.stop - first]
        return cls(
            index=index,
            plan=plan,
            first_waiting=first_waiting,
            observed=plan.policy.observed_layers(shape),
            num_cached=min(chunk.start, first),
            num_before=max(0, first - chunk.start),
            ends_prompt=chunk.stop >= end,
            rows_after_prompt=max(0, chunk.stop - end),
            guard=guard,
            waiting=waiting,
            visual=visual.to(device),
            num_text_first=max(0, plan.prompt.visual_spans[0][0] - max(chunk.start, first)),
            num_visual=int(visual.sum()),
        )

    @property
    def num_prompt_rows(self) -> int:
        """Prompt rows at the stage at work, from the first one on that may wait."""
        return self.visual.shape[0]

    def observe(self, x_in: Tensor, x_out: Tensor) -> None:
        """Take in a sub-module, `[num_prompt_rows, C]` in and out."""
        policy, shape = self.plan.policy, (self.num_visual,)
        scope = slice(self.num_text_first, None)

        def compute() -> tuple[Tensor, Tensor]:
            numbers, total = policy.observe(x_in[scope], x_out[scope], self.visual[scope])
            return checked(numbers, shape), checked(total, ())

        def instead() -> tuple[Tensor, Tensor]:
            return x_in.new_zeros(shape, dtype=torch.float32), x_in.new_zeros(()).float()

        terms = self.guard.ask(policy, compute, instead)
        if not self.is_complete:
            self.terms.append(terms)
        else:
            self._add([terms])

    def put_aside(self, rows: list[int], positions: Tensor) -> None:
        """Leave the chunk for the last one, which goes on with it.

        Args:
            rows: Where its rows lie.
            positions: Their positions, `[n]` or `[3, n]`.
        """
        self.is_aside = True
        self.waiting.rows += rows
        self.waiting.positions.append(positions)
        self.waiting.terms.append(self.terms)

    def take_up(self) -> None:
        """Go on with all rows of the prompt: those that waited, then this chunk's."""
        self.is_complete = True
        self.visual = _mask(self.plan).to(self.visual.device)
        self.num_text_first = self.plan.prompt.visual_spans[0][0] - self.plan.first
        self.num_visual = self.plan.prompt.num_visual
        for chunks in zip(*self.waiting.terms, self.terms, strict=True):
            self._add(chunks)

    def _add(self, chunks: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add the scores of one sub-module, whose terms come from all chunks of the prompt."""
        numbers, totals = zip(*chunks, strict=True)
        total = torch.stack(totals).sum()
        scores = torch.cat(numbers) / torch.where(total == 0, 1.0, total)
        self.accumulated = scores if self.accumulated is None else self.accumulated + scores

    def choose(self, dropped: int, attention: Callable[[], Tensor]) -> Tensor:
        """Drop visual rows.

        Args:
            dropped: How many.
            attention: Computes `SelectInputs.instruction_attention`.

        Returns:
            The rows of the request that are left, ascending.
        """
        policy, num_visual = self.plan.policy, self.num_visual
        keep = num_visual - dropped
        inputs = SelectInputs(keep, num_visual, self.accumulated, attention)
        kept = self.guard.ask(
            policy,
            lambda: checked(policy.select(inputs), (keep,)),
            lambda: evenly(num_visual, keep, self.visual.device),
        )
        visual_rows = self.visual.nonzero().squeeze(1)
        alive = ~self.visual
        alive[visual_rows[kept]] = True
        if self.accumulated is not None:
            self.accumulated = self.accumulated[kept]
        self.visual, self.num_visual = self.visual[alive], keep
        end = self.num_before + len(alive)
        before = torch.arange(self.num_before, device=alive.device)
        after = torch.arange(end, end + self.rows_after_prompt, device=alive.device)
        return torch.cat([before, alive.nonzero().squeeze(1) + self.num_before, after])

    def attention_of_text(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Return the attention of the text after the last image to the visual rows.

        Args:
            query: `[HQ, t, D]` of this rank's heads, of the text rows.
            key: `[H, rows, D]`, those of text before the first image too.
            scale: Factor of the logits.
        """
        end = key.shape[1]
        text = torch.arange(end - query.shape[1], end, device=query.device)
        before = self.visual.new_zeros(end - self.num_prompt_rows)
        visual = torch.cat([before, self.visual])
        score = instruction_attention(query, key, text, visual, scale=scale)
        tp = get_tp_group()
        # every rank holds an equal share of the heads, so the mean of means is the mean
        return tp.all_reduce(score) / tp.world_size if tp.world_size > 1 else score


def _mask(plan: AfterPrompt) -> Tensor:
    """Return `[rows]` which rows of the prompt are visual, from the first one on that may wait."""
    visual = torch.zeros(plan.prompt.num_tokens, dtype=torch.bool)
    for first, end in plan.prompt.visual_spans:
        visual[first:end] = True
    return visual[plan.first :]
