"""The final hidden state of each prompt's last token: recorded in the worker, asked for offline.

It is what the model predicts the first token from, after the final norm. vLLM hands out tokens and
log-probs only, so the worker keeps it back for requests that carry `SAMPLE`, once it was told to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenprune.engine.config import engine_shape
from tokenprune.engine.prompts import prompt_layout, visual_ranges
from tokenprune.engine.scheduler import CHECKSUM
from tokenprune.errors import ConfigurationError
from tokenprune.lengths import PromptLayout
from tokenprune.policies import EngineShape
from tokenprune.request import Axes, flatten

if TYPE_CHECKING:
    from PIL.Image import Image
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.model_runner import ExecuteModelState

SAMPLE = "tokenprune_sample"


@dataclass(frozen=True, slots=True)
class LastHidden:
    """What the model made of one prompt.

    Attributes:
        hidden: `[C]` float32, the last token's hidden state after the final norm.
        num_visual: Visual tokens of the prompt.
        kept: Visual tokens kept per engine stage, or None where the prompt was not pruned.
    """

    hidden: np.ndarray
    num_visual: int
    kept: tuple[int, ...] | None


class LastHiddenRecorder:
    """The worker's part."""

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
            pruned = getattr(output, CHECKSUM, {}).get(request_id)
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


class LastHiddenProbe:
    """Asks an offline engine the same prompts again and again, with one pruning or another."""

    def __init__(self, llm: Any, samples: Iterable[tuple[Sequence[Image], str]]) -> None:
        """Prepare the prompts.

        Args:
            llm: vLLM's `LLM` with our worker.
            samples: Pictures and text of each prompt; the model's chat template joins them.

        Raises:
            ConfigurationError: The model's visual tokens cannot be pruned.
        """
        self._llm = llm
        self._config = llm.llm_engine.vllm_config
        self.engine: EngineShape = engine_shape(self._config)
        if self.engine.unsupported is not None:
            raise ConfigurationError(
                f"the model must take pictures and allow pruning them: {self.engine.unsupported}"
            )
        self._messages = [_message(pictures, text) for pictures, text in samples]
        llm.collective_rpc("tokenprune_record_last_hidden")

    @property
    def model(self) -> dict[str, Any]:
        """What names the model and how it is run, as plain data."""
        model = self._config.model_config
        return {
            "model": model.model,
            "revision": model.revision,
            "dtype": str(model.dtype),
            "quantization": model.quantization,
            "prune_layers": list(self.engine.prune_layers),
        }

    @property
    def patch_grid(self) -> int:
        """Side of the vision tower's square grid of patches."""
        vision = self._config.model_config.hf_config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    def ask(self, pruning: Axes) -> list[LastHidden]:
        """Run every prompt once and return what the model made of it, in order.

        Raises:
            ConfigurationError: vLLM takes a prompt not, e.g. because it is too long.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        params = [
            SamplingParams(temperature=0, max_tokens=1, extra_args={SAMPLE: i, **flatten(pruning)})
            for i in range(len(self._messages))
        ]
        try:
            self._llm.chat(self._messages, params, use_tqdm=False)
        except VLLMValidationError as error:
            raise ConfigurationError(
                f"a prompt must be one the model takes, got: {error}"
            ) from None
        # the hidden states of all ranks are equal
        found = self._llm.collective_rpc("tokenprune_take_last_hidden")[0]
        by_sample = {entry["sample"]: entry for entry in found}
        assert len(by_sample) == len(self._messages), "every prompt must be recorded once"
        return [
            LastHidden(
                np.asarray(entry["hidden"], dtype=np.float32),
                entry["num_visual"],
                entry["kept"] and tuple(entry["kept"]),
            )
            for _, entry in sorted(by_sample.items())
        ]


def _message(pictures: Sequence[Image], text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_pil", "image_pil": p} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
