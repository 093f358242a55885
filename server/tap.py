"""The tap on vLLM's engine client: plans each prompt before it is sent, or refuses it.

It sits where the placeholders of the images are already known and nothing has been sent to the
client yet, so a refusal is still a plain HTTP 400, also for a streaming request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from tokenprune.engine.prompts import VISUAL_MODALITIES, prompt_layout, wants_prompt_logprobs
from tokenprune.errors import PolicyError
from tokenprune.lengths import PromptLayout
from tokenprune.policies import EngineShape
from tokenprune.request import (
    AXES,
    FLAT_PRESET,
    Axes,
    RequestPlan,
    flatten,
    has_flat,
    make_plan,
    parse_flat,
)
from tokenprune.server.usage import PromptRecord, current_record

DEFAULT_REFUSED = "default_refused"


class EngineTap:
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
        explicit = has_flat(sampling_params.extra_args)
        if (not explicit and self._default.is_off) or (record is not None and record.bypass):
            return self._client.generate(prompt, sampling_params, *args, **kwargs)
        layout = layout_of(prompt)
        wishes = {
            "prompt_logprobs": wants_prompt_logprobs(sampling_params),
            "max_tokens": sampling_params.max_tokens,
        }
        if explicit:
            pruning = parse_flat(sampling_params.extra_args)
            plan = plan_explicit(pruning, layout, self._engine, **wishes)
        else:
            plan = plan_default(self._default, layout, self._engine, **wishes)
            keys = {FLAT_PRESET: "off"} if plan.lengths is None else flatten(self._default)
            sampling_params.extra_args = {**(sampling_params.extra_args or {}), **keys}
        outputs = self._client.generate(prompt, sampling_params, *args, **kwargs)
        if record is None or plan.pruning.is_off:
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


def plan_explicit(
    pruning: Axes, layout: PromptLayout, engine: EngineShape, **wishes: Any
) -> RequestPlan:
    """Plan what a request asked for itself.

    Raises:
        PolicyError: It cannot be had, and the reason is not simply that nothing is to prune.
    """
    plan = make_plan(pruning, layout, engine, **wishes)
    if plan.skipped.get("kv") == "model_unsupported":
        raise PolicyError(
            f"pruning.kv must be left out with this server: {engine.kv_unsupported}", "pruning.kv"
        )
    reason = plan.skipped.get("channels")
    if reason == "not_allowed":
        raise PolicyError(
            "pruning.channels must be left out with this server; start it with "
            "--allow-channel-pruning",
            "pruning.channels",
        )
    if reason == "model_unsupported":
        raise PolicyError(
            f"pruning.channels must be left out with this server: {engine.channels_unsupported}",
            "pruning.channels",
        )
    reason = plan.skipped.get("visual")
    if reason == "model_unsupported" and layout.num_visual:
        raise PolicyError(
            f"pruning.visual must be left out with this model: {engine.unsupported}",
            "pruning.visual",
        )
    method = policy.name if (policy := pruning.policy("visual")) else None
    if reason == "importance_unsupported":
        raise PolicyError(
            f"pruning.visual.method must be another than {method} with this server: "
            f"{engine.importance_unsupported}",
            "pruning.visual.method",
        )
    if reason == "image_exceeds_batch":
        longest = max(end - start for start, end in layout.visual_spans)
        raise PolicyError(
            f"an image must have at most {engine.max_num_batched_tokens} tokens for "
            f"pruning.visual.method {method}, which takes it in one step, got {longest}; raise "
            "--max-num-batched-tokens or use another method",
            "pruning.visual.method",
        )
    if reason == "prompt_exceeds_batch":
        raise PolicyError(
            f"the prompt must have at most {engine.max_num_batched_tokens} tokens for "
            f"pruning.visual.method {method}, which scores it in one step, got "
            f"{layout.num_tokens}; raise --max-num-batched-tokens or use another method",
            "pruning.visual.method",
        )
    return plan


def plan_default(
    pruning: Axes, layout: PromptLayout, engine: EngineShape, **wishes: Any
) -> RequestPlan:
    """Plan the server's default, which never refuses: what cannot be had is skipped."""
    try:
        return make_plan(pruning, layout, engine, **wishes)
    except PolicyError:
        asked = [axis for axis in AXES if pruning.policy(axis) is not None]
        return RequestPlan(pruning, skipped=dict.fromkeys(asked, DEFAULT_REFUSED))
