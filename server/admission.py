"""Admits or refuses: plans each prompt before it is sent to the engine.

It stands where the placeholders of the images are already known and nothing has been sent to the
client yet, so a refusal is still a plain HTTP 400, also for a streaming request. It is also where
what a request asks for, or the server's default, becomes the keys that the engine reads: the
engine prunes what they say, and no more.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from vllm.exceptions import VLLMValidationError

from tokenprune.engine.prompts import VISUAL_MODALITIES, prompt_layout, wants_prompt_logprobs
from tokenprune.errors import PolicyError
from tokenprune.lengths import PromptLayout
from tokenprune.plan import RequestPlan, make_default_plan, make_plan
from tokenprune.request import FLAT_PREFIX, FLAT_PRESET, flatten, parse_flat
from tokenprune.server.usage import PromptRecord, RequestRecord, current_record
from tokenprune.shape import EngineShape


class PruningRefusedError(VLLMValidationError):
    """A refused request; vLLM answers it with HTTP 400 and `param`."""

    def __str__(self) -> str:
        # vLLM's form repeats the parameter after the message, which names it already
        return str(self.args[0])


class PlanningClient:
    """Stands in for the engine client of one serving object; everything else is forwarded."""

    def __init__(self, client: Any, engine: EngineShape) -> None:
        self._client = client
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        """Plan the prompt, then call the engine; a plain function, so it raises at once.

        Raises:
            PruningRefusedError: The request asks for something this engine or prompt cannot have.
        """
        record = current_record.get()
        if record is None:
            # a route that takes flat keys only, and whose answer says nothing
            record = RequestRecord(parse_flat(sampling_params.extra_args))
        if record.pruning.is_off or record.bypass is not None:
            return self._client.generate(prompt, sampling_params, *args, **kwargs)
        layout = layout_of(prompt)
        try:
            plan = self._plan(record, layout, sampling_params)
        except PolicyError as error:
            record.refused = error
            raise PruningRefusedError(str(error), parameter=error.param) from None
        if plan.is_pruned or record.explicit:
            rest = {
                key: value
                for key, value in (sampling_params.extra_args or {}).items()
                if key != FLAT_PRESET and not key.startswith(FLAT_PREFIX)
            }
            sampling_params.extra_args = rest | flatten(record.pruning)
        outputs = self._client.generate(prompt, sampling_params, *args, **kwargs)
        entry = PromptRecord(plan, layout, [0] * sampling_params.n)
        record.prompts.append(entry)
        return _count(outputs, entry)

    def _plan(self, record: RequestRecord, layout: PromptLayout, params: Any) -> RequestPlan:
        plan = (make_plan if record.explicit else make_default_plan)(
            record.pruning,
            layout,
            self._engine,
            prompt_logprobs=wants_prompt_logprobs(params),
            max_tokens=params.max_tokens,
        )
        if record.explicit:
            plan.refuse_what_is_skipped()
        return plan


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
