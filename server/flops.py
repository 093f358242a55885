"""Prefill cost of a request in the language model, full and spent, counted by formula.

Per layer with `n` tokens, hidden size `C`, `HQ` query heads and `H` KV heads of size `D`, and a
gated MLP of width `I`, in multiply-accumulates (MACs):

    projections  2 n C HQ D + 2 n C H D
    attention    2 p HQ D        p = n (n + 1) / 2 causal pairs, scores and values
    MLP          3 n C I

One MAC is two FLOPs. `causal=False` counts `p = n^2`, as published tables do. Not counted: what
pruning leaves as it is (the vision tower, embeddings, norms, and the output head), and scores that
are made in the vision tower. Prefix cache hits are not credited: pruned requests have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenprune.lengths import PromptLayout
from tokenprune.policies import EngineShape, VisualPolicy
from tokenprune.request import RequestPlan


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes the formula needs, of the whole model and not of one tensor-parallel rank."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int


def layer_macs(model: ModelShape, num_tokens: int, *, causal: bool = True) -> int:
    """Return the MACs of one decoder layer over `num_tokens` tokens of one prompt."""
    n, c = num_tokens, model.hidden_size
    q_size, kv_size = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    pairs = n * (n + 1) // 2 if causal else n * n
    return 2 * n * c * (q_size + kv_size) + 2 * pairs * q_size + 3 * n * c * model.intermediate_size


def prefill_macs(
    model: ModelShape, stages: Iterable[tuple[int, int]], *, causal: bool = True
) -> int:
    """Return the MACs of a prefill whose stages are `(layers, tokens)`."""
    return sum(layers * layer_macs(model, n, causal=causal) for layers, n in stages)


def score_macs(model: ModelShape, observed: Iterable[int], cuts: Iterable[tuple[int, int]]) -> int:
    """Return the MACs of choosing visual tokens by score.

    Args:
        model: The model's sizes.
        observed: Tokens at each layer whose two sub-modules are scored. A score is one dot
            product and two norms per token and sub-module: `3 n C`.
        cuts: `(tokens, text rows)` before each cut that reads the next layer's attention: keys
            of all tokens, queries of the text rows, and their products.
    """
    q_size, kv_size = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    transitions = sum(2 * 3 * n * model.hidden_size for n in observed)
    attention = sum(
        n * model.hidden_size * kv_size + t * model.hidden_size * q_size + t * n * q_size
        for n, t in cuts
    )
    return transitions + attention


def prefill_flops(
    plan: RequestPlan, prompt: PromptLayout, engine: EngineShape, model: ModelShape
) -> tuple[int, int]:
    """Return the FLOPs of the prefill without and with pruning."""
    full = 2 * engine.num_layers * layer_macs(model, prompt.num_tokens)
    lengths, visual = plan.lengths, plan.visual
    if lengths is None:
        return full, full
    # what is evicted from the cache was computed before
    tokens = lengths.all_entered(prompt.num_tokens)
    spent = prefill_macs(model, zip(engine.stage_sizes(), tokens, strict=True))
    policy = plan.pruning.policy("visual")
    if visual is not None and plan.needs_whole_prompt and isinstance(policy, VisualPolicy):
        ends = (*engine.prune_layers, engine.num_layers)

        def tokens_at(layer: int) -> int:
            return next(n for n, end in zip(tokens, ends, strict=True) if layer < end)

        spent += score_macs(
            model,
            (tokens_at(layer) for layer in policy.observed_layers(engine)),
            (
                (tokens_at(layer - 1) if layer else prompt.num_tokens, prompt.num_text_after)
                for layer, _ in visual.cuts
            ),
        )
    return full, 2 * spent
