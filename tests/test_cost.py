"""Prefill FLOPs against the numbers TransPrune publishes, and against sums done by hand."""

import pytest

from tokenprune.cost import layer_macs, prefill_flops, prefill_macs, slots_held
from tokenprune.lengths import PromptLayout
from tokenprune.plan import make_plan
from tokenprune.policies.visual.transprune import TransPrune
from tokenprune.request import parse_pruning
from tokenprune.shape import EngineShape, ModelShape

LLAVA_7B = ModelShape(
    hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_size=128
)
TINY = ModelShape(hidden_size=8, intermediate_size=16, num_heads=4, num_kv_heads=2, head_size=2)


# arXiv 2507.20630: visual tokens only, attention counted over all pairs
@pytest.mark.parametrize(
    ("stages", "tmacs"),
    [
        pytest.param([(32, 576)], 3.817, id="llava-baseline"),
        pytest.param([(7, 576), (2, 504), (3, 360), (20, 72)], 1.557, id="llava-high"),
        pytest.param([(32, 2880)], 20.825, id="next-baseline"),
        pytest.param([(7, 2880), (2, 2520), (3, 1800), (20, 360)], 8.330, id="next-high"),
    ],
)
def test_published_totals_are_reproduced(stages: list[tuple[int, int]], tmacs: float) -> None:
    assert prefill_macs(LLAVA_7B, stages, causal=False) / 1e12 == pytest.approx(tmacs, abs=5e-4)


def test_a_layer_is_the_sum_of_its_matrix_products() -> None:
    # q and o: 2 * 3*8*8, k and v: 2 * 3*8*4, 6 causal pairs * 8 * 2, gated MLP: 3 * 3*8*16
    assert layer_macs(TINY, 3) == 384 + 192 + 96 + 1152
    assert layer_macs(TINY, 3, causal=False) == 384 + 192 + 144 + 1152


def test_scores_cost_what_their_products_cost() -> None:
    engine = EngineShape(num_layers=2, boundaries=(0, 1), max_num_batched_tokens=2048)
    # one text token, two of the image, two of text after it
    prompt = PromptLayout(num_tokens=5, visual_spans=((1, 3),))
    policy = TransPrune(prune_layers=[1], keep_ratio=0.5)
    plan = policy.plan(prompt, engine)
    # one layer, two sub-modules, 4 tokens from the image on; of all 5 keys 5*8*4, queries 2*8*8,
    # products 2*5*8
    macs = 2 * 3 * 4 * 8 + 160 + 128 + 80
    assert policy.score_macs(plan, prompt, engine, TINY) == macs
    # a cut before the first layer observes nothing, and sees all tokens
    first = TransPrune(prune_layers=[0], keep_ratio=0.5)
    assert first.score_macs(first.plan(prompt, engine), prompt, engine, TINY) == 160 + 128 + 80


def test_pruning_spends_less_and_scores_are_paid_for() -> None:
    engine = EngineShape(num_layers=8, boundaries=(0, 2, 3), max_num_batched_tokens=2048)
    prompt = PromptLayout(num_tokens=180, visual_spans=((4, 148),))

    def cost(method: str) -> tuple[int, int]:
        pruning = parse_pruning({"visual": {"method": method, "keep_ratio": 0.25}})
        plan = make_plan(pruning, prompt, engine)
        scores = plan.visual.policy.score_macs(plan.visual, prompt, engine, LLAVA_7B)
        return prefill_flops(plan.lengths, engine, LLAVA_7B, scores)

    full, spent = cost("uniform")
    full_scored, spent_scored = cost("transprune")
    assert full == full_scored == 2 * 8 * layer_macs(LLAVA_7B, 180)
    assert spent < spent_scored < full


def test_scores_of_the_vision_tower_cost_the_decoder_nothing() -> None:
    engine = EngineShape(num_layers=8, boundaries=(0, 2, 4), max_num_batched_tokens=2048)
    prompt = PromptLayout(num_tokens=180, visual_spans=((4, 148),))
    pruning = parse_pruning({"visual": {"method": "vflowopt", "stages": [0.5, 0.5, 0.5]}})
    plan = make_plan(pruning, prompt, engine)
    assert plan.visual.policy.score_macs(plan.visual, prompt, engine, TINY) == 0
    full, spent = prefill_flops(plan.lengths, engine, TINY)
    assert full == 2 * 8 * layer_macs(TINY, 180)
    tokens = [(2, 36 + 72), (2, 36 + 36), (4, 36 + 18)]
    assert spent == 2 * prefill_macs(TINY, tokens)


def test_evicting_saves_no_prefill_work() -> None:
    engine = EngineShape(num_layers=8, boundaries=(0, 2), max_num_batched_tokens=2048)
    prompt = PromptLayout(num_tokens=100)
    kv = {"method": "lagkv", "lag": 16, "keep_ratio": 0.1}
    plan = make_plan(parse_pruning({"kv": kv}), prompt, engine)
    assert plan.lengths.physical(100, 0) < 100
    full, spent = prefill_flops(plan.lengths, engine, TINY)
    assert full == spent == 2 * 8 * layer_macs(TINY, 100)


def test_an_unpruned_request_spends_all() -> None:
    engine = EngineShape(num_layers=8, boundaries=(0, 2), max_num_batched_tokens=2048)
    prompt = PromptLayout(num_tokens=10)
    plan = make_plan(parse_pruning({"visual": {"method": "uniform"}}), prompt, engine)
    full, spent = prefill_flops(plan.lengths, engine, TINY)
    assert full == spent == 2 * 8 * layer_macs(TINY, 10)


def test_slots_are_summed_over_the_layers_of_each_stage() -> None:
    engine = EngineShape(num_layers=8, boundaries=(0, 2), max_num_batched_tokens=2048)
    prompt = PromptLayout(num_tokens=50, visual_spans=((4, 44),))
    pruning = parse_pruning(
        {"visual": {"method": "uniform", "prune_layers": [2], "keep_ratio": 0.5}}
    )
    plan = make_plan(pruning, prompt, engine)
    assert slots_held(plan.lengths, engine, 60) == 2 * 60 + 6 * 40
