"""Records the final hidden state of each prompt's last token, in the worker.

It is what the model predicts the first token from, after the final norm. vLLM hands out tokens and
log-probs only, so the worker keeps it back for requests that carry `SAMPLE`, once it was told to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenprune.engine.prompts import prompt_layout, visual_ranges
from tokenprune.engine.request_table import EXPECTED_LENGTHS
from tokenprune.lengths import PromptLayout

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.model_runner import ExecuteModelState

SAMPLE = "tokenprune_sample"


class HiddenRecorder:
    """Records in the worker."""

    def __init__(self) -> None:
        self._asked: dict[str, tuple[int, PromptLayout]] = {}
        self._found: list[dict[str, Any]] = []

    def observe(self, output: SchedulerOutput, state: ExecuteModelState | None) -> None:
        """Record the prompts that a step completes.

        Args:
            output: The step.
            state: What the step's forward pass left; None where it ran none.
        """
        for new in output.scheduled_new_reqs:
            params = new.sampling_params
            sample = (params.extra_args or {}).get(SAMPLE) if params is not None else None
            if sample is not None:
                layout = prompt_layout(new.prompt_len, visual_ranges(new.mm_features))
                self._asked[new.req_id] = (sample, layout)
        if state is None or state.hidden_states is None:
            return
        batch = state.input_batch
        for i, request_id in enumerate(batch.req_ids):
            if request_id not in self._asked:
                continue
            sample, layout = self._asked[request_id]
            computed = int(batch.num_computed_tokens_np[i]) + int(batch.num_scheduled_tokens[i])
            if computed != layout.num_tokens:
                continue
            del self._asked[request_id]
            row = int(batch.query_start_loc_np[i + 1]) - 1
            pruned = getattr(output, EXPECTED_LENGTHS, {}).get(request_id)
            self._found.append(
                {
                    "sample": sample,
                    # plain data, the only kind that passes every way to another process
                    "hidden": state.hidden_states[row].float().tolist(),
                    "num_visual": layout.num_visual,
                    "kept": pruned and [_kept(layout, held) for held in pruned[1]],
                }
            )

    def take(self) -> list[dict[str, Any]]:
        """Return what was recorded, and forget it."""
        found, self._found = self._found, []
        return found


def _kept(layout: PromptLayout, held: int) -> int:
    return layout.num_visual - (layout.num_tokens - held)
