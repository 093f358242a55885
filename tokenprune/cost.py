"""What a request costs, counted by formula from lengths and sizes: FLOPs of prefill, KV bytes.

Per layer with `n` tokens, hidden size `C`, `HQ` query heads and `H` KV heads of size `D`, and a
gated MLP of width `I`, in multiply-accumulates (MACs):

    projections  2 n C HQ D + 2 n C H D
    attention    2 p HQ D        p = n (n + 1) / 2 causal pairs, scores and values
    MLP          3 n C I

One MAC is two FLOPs. `causal=False` counts `p = n^2`, as published tables do. Not counted: what
pruning leaves as it is (the vision tower, embeddings, norms, and the output head), and scores that
are made in the vision tower. What a method's own scores cost in the decoder is the method's to
say (`VisualPolicy.score_macs`). Prefix cache hits are credited to neither count: both are of a
prompt that is computed from its first token on.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune.lengths import PhysicalLengths
from tokenprune.shape import EngineShape, ModelShape


def layer_macs(model: ModelShape, num_tokens: int, *, causal: bool = True) -> int:
    """Return the MACs of one decoder layer over `num_tokens` tokens of one prompt."""
    n, c = num_tokens, model.hidden_size
    pairs = n * (n + 1) // 2 if causal else n * n
    projections = 2 * n * c * (model.q_size + model.kv_size)
    return projections + 2 * pairs * model.q_size + 3 * n * c * model.intermediate_size


def prefill_macs(
    model: ModelShape, stages: Iterable[tuple[int, int]], *, causal: bool = True
) -> int:
    """Return the MACs of a prefill whose stages are `(layers, tokens)`."""
    return sum(layers * layer_macs(model, n, causal=causal) for layers, n in stages)


def prefill_flops(
    lengths: PhysicalLengths, engine: EngineShape, model: ModelShape, score_macs: int = 0
) -> tuple[int, int]:
    """Return the FLOPs of the prefill without and with pruning.

    Args:
        lengths: Lengths of the request.
        engine: What serves it.
        model: The model's sizes.
        score_macs: What choosing the tokens costs besides.
    """
    prompt = lengths.num_prompt_tokens
    full = engine.num_layers * layer_macs(model, prompt)
    # what is evicted from the cache was computed before
    stages = zip(engine.stage_sizes(), lengths.all_written(prompt), strict=True)
    return 2 * full, 2 * (prefill_macs(model, stages) + score_macs)


def slots_held(lengths: PhysicalLengths, engine: EngineShape, num_computed: int) -> int:
    """Return the KV slots held once `num_computed` tokens are computed, summed over the layers."""
    held = lengths.all_stages(num_computed)
    return sum(size * n for size, n in zip(engine.stage_sizes(), held, strict=True))
