"""A request whose visual tokens are chosen by the tensors of its whole prompt, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from tokenprune.engine.guard import PolicyGuard, checked, evenly
from tokenprune.kernels import instruction_attention
from tokenprune.policies import AfterPrompt, SelectInputs
from tokenprune.shape import EngineShape


@dataclass(slots=True)
class PromptSelection:
    """A request of the step whose policy chooses from the whole prompt.

    Attributes:
        index: Place in the batch.
        plan: How many stay.
        observed: Layers whose sub-modules the policy is shown.
        visual: `[rows]` bool over the request's current prompt rows.
        rows_after_prompt: Rows of tokens generated before a preemption; always kept.
        guard: Asks the policy.
        accumulated: `[num_visual]` float32 sum of what the policy made of observed layers.
    """

    index: int
    plan: AfterPrompt
    observed: range
    visual: Tensor
    rows_after_prompt: int
    guard: PolicyGuard
    accumulated: Tensor | None = None

    @classmethod
    def of(
        cls,
        index: int,
        plan: AfterPrompt,
        chunk: range,
        shape: EngineShape,
        device: torch.device,
        guard: PolicyGuard,
    ) -> Self:
        """Return the selection among the rows of a step, which must hold the whole prompt."""
        assert chunk.start == 0, "the scheduler must keep this prompt whole"
        visual = torch.zeros(plan.prompt.num_tokens, dtype=torch.bool)
        for first, end in plan.prompt.visual_spans:
            visual[first:end] = True
        return cls(
            index=index,
            plan=plan,
            observed=plan.policy.observed_layers(shape),
            visual=visual.to(device),
            rows_after_prompt=len(chunk) - plan.prompt.num_tokens,
            guard=guard,
        )

    @property
    def num_prompt_rows(self) -> int:
        """Prompt rows that are left."""
        return self.visual.shape[0]

    @property
    def num_visual(self) -> int:
        """Visual rows that are left."""
        prompt = self.plan.prompt
        return self.num_prompt_rows - (prompt.num_tokens - prompt.num_visual)

    def observe(self, x_in: Tensor, x_out: Tensor) -> None:
        """Add the score of a sub-module, `[rows, C]` in and out, to those of earlier ones."""
        policy, shape = self.plan.policy, (self.num_visual,)
        score = self.guard.ask(
            policy,
            lambda: checked(policy.observe(x_in, x_out, self.visual), shape),
            lambda: x_in.new_zeros(shape, dtype=torch.float32),
        )
        self.accumulated = score if self.accumulated is None else self.accumulated + score

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
        self.visual = self.visual[alive]
        survivors = alive.nonzero().squeeze(1)
        if self.rows_after_prompt:
            end = len(alive) + self.rows_after_prompt
            tail = torch.arange(len(alive), end, device=alive.device)
            survivors = torch.cat([survivors, tail])
        return survivors

    def attention_of_text(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Return the attention of the text after the last image to the visual rows.

        Args:
            query: `[HQ, rows, D]` of this rank's heads.
            key: `[H, rows, D]`.
            scale: Factor of the logits.
        """
        rows = query.shape[1]
        text = torch.arange(rows - self.plan.prompt.num_text_after, rows, device=query.device)
        score = instruction_attention(query[:, text], key, text, self.visual, scale=scale)
        tp = get_tp_group()
        # every rank holds an equal share of the heads, so the mean of means is the mean
        return tp.all_reduce(score) / tp.world_size if tp.world_size > 1 else score
