"""From vLLM's placeholder ranges to a prompt layout; the same in every process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenprune.lengths import PromptLayout
from tokenprune.plan import RequestPlan, make_plan
from tokenprune.request import parse_flat
from tokenprune.shape import EngineShape

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams

VISUAL_MODALITIES = ("image", "video")


def prompt_layout(num_tokens: int, ranges: Iterable[PlaceholderRange]) -> PromptLayout:
    """Return the layout of a prompt with visual placeholders at `ranges`."""
    images = sorted(
        tuple((int(first), int(last) + 1) for first, last in r.extract_embeds_range())
        for r in ranges
    )
    return PromptLayout(
        num_tokens,
        tuple(span for spans in images for span in spans),
        tuple(len(spans) for spans in images if spans),
    )


def visual_ranges(features: Iterable[MultiModalFeatureSpec]) -> list[PlaceholderRange]:
    """Return the placeholder ranges of the images and videos among `features`."""
    return [f.mm_position for f in features if f.modality in VISUAL_MODALITIES]


def wants_prompt_logprobs(params: SamplingParams) -> bool:
    """Return whether a request asks for log-probs of its prompt."""
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None


def plan_request(params: SamplingParams, layout: PromptLayout, shape: EngineShape) -> RequestPlan:
    """Plan one request from its flat keys; without any it is not pruned.

    The server's default is not known here: it reaches the engine as keys, from the one place
    that reads HTTP requests.

    Raises:
        PolicyError: The keys are not legal or do not fit the engine.
    """
    return make_plan(
        parse_flat(params.extra_args),
        layout,
        shape,
        prompt_logprobs=wants_prompt_logprobs(params),
        max_tokens=params.max_tokens,
    )
