"""Admits or refuses: plans each prompt before it is sent to the engine.

It stands where the placeholders of the images are already known and nothing has been sent to the
client yet, so a refusal is still a plain HTTP 400, also for a streaming request. It is also the
one place that applies the server's default: the engine prunes what its keys say, and no more.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from tokenprune.engine.prompts import VISUAL_MODALITIES, prompt_layout, wants_prompt_logprobs
from tokenprune.lengths import PromptLayout
from tokenprune.plan import make_default_plan, make_plan
from tokenprune.request import Axes, asked, flatten
from tokenprune.server.usage import PromptRecord, current_record
from tokenprune.shape import EngineShape


class PlanningClient:
    """Stands in for the engine client of one serving object; everything else is forwarded."""

    def __init__(self, client: Any, engine: EngineShape, default: Axes) -> None:
        self._client = client
        self._engine = engine
        self._default = default

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        """Plan the prompt, then call the engine; a plain function, so it raises at once.

        Raises:
            PolicyError: The request asks for something this engine or prompt cannot have.
        """
        record = current_record.get()
        if record is None:
            pruning, explicit = asked(sampling_params.extra_args, self._default)
        else:
            # not every parameter object of vLLM's still has the keys: beam search makes its own
            pruning, explicit = record.pruning, record.explicit
        if pruning.is_off or (record is not None and record.bypass):
            return self._client.generate(prompt, sampling_params, *args, **kwargs)
        layout = layout_of(prompt)
        plan = (make_plan if explicit else make_default_plan)(
            pruning,
            layout,
            self._engine,
            prompt_logprobs=wants_prompt_logprobs(sampling_params),
            max_tokens=sampling_params.max_tokens,
        )
        if explicit:
            plan.refuse_what_is_skipped()
        elif plan.is_pruned:
            keys = flatten(pruning)
            sampling_params.extra_args = {**(sampling_params.extra_args or {}), **keys}
        outputs = self._client.generate(prompt, sampling_params, *args, **kwargs)
        if record is None:
            return outputs
        entry = PromptRecord(plan, layout, [0] * sampling_params.n)
        record.prompts.append(entry)
        return _count(outputs, entry)


async def _count(
    outputs: AsyncGenerator[Any, None], entry: PromptRecord
) -> AsyncGenerator[Any, None]:
    # vLLM's routes ask for new tokens only, or for one final output: never for the same twice
    async with aclosing(outputs):
        async for output in outputs:
            for choice in output.outputs:
                entry.completions[choice.index] += len(choice.token_ids)
            yield output


def layout_of(prompt: Mapping[str, Any]) -> PromptLayout:
    """Return where the visual tokens of a rendered prompt are."""
    tokens = prompt.get("prompt_token_ids")
    placeholders = prompt.get("mm_placeholders") or {}
    return prompt_layout(
        len(tokens if tokens is not None else prompt["prompt_embeds"]),
        [r for modality in VISUAL_MODALITIES for r in placeholders.get(modality, ())],
    )
