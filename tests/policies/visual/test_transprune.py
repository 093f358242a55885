"""TransPrune: the published schedule, the worked example, and an independent implementation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenprune.kernels import instruction_attention
from tokenprune.lengths import PromptLayout
from tokenprune.policies import SelectInputs, top_k
from tokenprune.policies.visual.transprune import TransPrune
from tokenprune.shape import EngineShape

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "transprune.json").read_text())
# float32 against float64 over sums of at most 100 terms
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN
    yield
    torch.use_deterministic_algorithms(False)


def engine(num_layers, *boundaries):
    return EngineShape(num_layers, (0, *boundaries), 4096)


PROMPT = PromptLayout(600, ((5, 581),))


# schedule


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        pytest.param(engine(32, 7, 9, 12), (576, 504, 360, 72), id="published-layers"),
        pytest.param(engine(32, 8, 12, 20), (576, 360, 72, 72), id="default-boundaries"),
        pytest.param(engine(32, 12), (576, 72), id="all-cuts-on-one-boundary"),
        pytest.param(engine(8, 2, 3, 5), (576, 360, 72, 72), id="eight-layers"),
        pytest.param(engine(28, 8, 12, 16), (576, 360, 72, 72), id="28-layers"),
        pytest.param(engine(28, 6, 8, 10), (576, 504, 360, 72), id="28-layers-finer"),
    ],
)
def test_published_schedule(shape, kept):
    assert TransPrune().plan(PROMPT, shape).kept == kept


def test_published_schedule_of_a_longer_prompt():
    plan = TransPrune().plan(PromptLayout(2900, ((5, 2885),)), engine(32, 7, 9, 12))
    assert plan.kept == (2880, 2520, 1800, 360)


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        pytest.param(engine(8, 2, 3, 5), [2, 3], id="eight"),
        # scaled: 6.1, 7.9, 10.5; the first two are nearest to 8
        pytest.param(engine(28, 8, 12, 16), [8, 12], id="28"),
        pytest.param(engine(32, 8, 12, 20), [8, 12], id="32"),
        # 7 lies between 6 and 8, and the lower one is taken
        pytest.param(engine(32, 6, 8, 12), [6, 8, 12], id="halfway"),
        pytest.param(engine(80, 20, 30, 50), [20, 30], id="80"),
    ],
)
def test_published_layers_snap_to_the_nearest_boundary(shape, layers):
    assert [layer for layer, _ in TransPrune().cuts(shape)] == layers


def test_where_cuts_meet_on_a_boundary_the_deeper_one_holds():
    assert TransPrune().cuts(engine(32, 8, 12)) == ((8, pytest.approx(0.625)), (12, 0.125))


def test_keep_ratio_scales_the_published_proportions():
    cuts = TransPrune(keep_ratio=0.5).cuts(engine(32, 7, 9, 12))
    # published: 1/8, 3/8 and 7/8 are dropped, so 1/7, 3/7 and all of the drop is done
    expected = [(7, 1 - 0.5 / 7), (9, 1 - 0.5 * 3 / 7), (12, 0.5)]
    assert list(cuts) == [(layer, pytest.approx(r)) for layer, r in expected]


@pytest.mark.parametrize(
    ("shape", "parameters", "layers"),
    [
        pytest.param(engine(32, 7, 9, 12), {}, range(6, 12), id="published"),
        pytest.param(engine(32, 8, 12, 20), {}, range(6, 12), id="default-boundaries"),
        pytest.param(engine(8, 2, 3, 5), {}, range(1, 3), id="eight-layers"),
        pytest.param(engine(28, 8, 12, 16), {}, range(5, 12), id="28-layers"),
        pytest.param(engine(32, 4, 8), {"prune_layers": [4]}, range(3, 4), id="early-cut"),
        pytest.param(engine(32, 4, 8), {"prune_layers": [4, 8]}, range(3, 8), id="early-and-late"),
        pytest.param(engine(32, 4), {"prune_layers": [0]}, range(0), id="before-any-layer"),
    ],
)
def test_observed_layers(shape, parameters, layers):
    assert TransPrune(**parameters).observed_layers(shape) == layers


# the worked example of the specification


VISUAL = torch.tensor([False, True, True, True, True, False, False])
ROWS = {"A": [0, 1, 2, 3, 4, 5, 6], "B": [0, 1, 2, 3, 5, 6]}


def golden_tensor(name):
    return torch.tensor(GOLDEN[name], dtype=torch.float32)


def golden_ttv(policy, stage):
    rows = ROWS[stage]
    pairs = [
        (
            golden_tensor(f"TP.{stage}_{part}_in")[rows],
            golden_tensor(f"TP.{stage}_{part}_out")[rows],
        )
        for part in ("attn", "ffn")
    ]
    return sum(observed(policy, x_in, x_out, VISUAL[rows]) for x_in, x_out in pairs)


def observed(policy, x_in, x_out, visual):
    numbers, total = policy.observe(x_in, x_out, visual)
    return numbers / total


def golden_iga(stage):
    rows = ROWS[stage]
    text = torch.tensor([len(rows) - 2, len(rows) - 1])
    q, k = golden_tensor(f"TP.{stage}_q"), golden_tensor(f"TP.{stage}_k")[:, rows]
    return instruction_attention(q, k, text, VISUAL[rows], scale=2**-0.5)


def inputs(keep, accumulated, attention):
    return SelectInputs(keep, len(attention), accumulated, lambda: attention)


def close(actual, name):
    torch.testing.assert_close(actual, golden_tensor(name), **TOLERANCE)


def test_the_code_form_scores_and_keeps_as_in_the_worked_example():
    policy = TransPrune()
    ttv = golden_ttv(policy, "A")
    first = inputs(3, ttv, golden_iga("A"))
    close(policy.score(first), "tp.A.score(code)")
    kept = policy.select(first)
    assert kept.tolist() == GOLDEN["tp.A.keep3(code) original image index"]

    ttv = ttv[kept] + golden_ttv(policy, "B")
    close(ttv, "tp.B.accumulated_ttv(image)")
    second = inputs(1, ttv, golden_iga("B"))
    close(policy.score(second), "tp.B.score(code, alpha=.5)")
    # image token i lies at position i + 1
    assert (kept[policy.select(second)] + 1).tolist() == GOLDEN["tp.B.keep1 original position"]


def test_the_paper_form_scores_and_keeps_as_in_the_worked_example():
    policy = TransPrune(form="paper")
    ttv = golden_ttv(policy, "A")
    close(ttv, "tp.A.ttv(paper, image tokens)")
    close(policy.score(inputs(3, ttv, golden_iga("A"))), "tp.A.score(paper)")
    kept = policy.select(inputs(3, ttv, golden_iga("A")))
    assert kept.tolist() == GOLDEN["tp.A.keep3(paper) original image index"]


def test_code_is_the_default_form():
    assert TransPrune().form == "code"
    assert TransPrune().alpha == 0.5


# score and selection


def test_alpha_mixes_the_two_scores():
    ttv, iga = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    paper = {alpha: TransPrune(form="paper", alpha=alpha) for alpha in (0.0, 0.25, 1.0)}
    assert paper[0.0].score(inputs(2, ttv, iga)).tolist() == iga.tolist()
    assert paper[0.25].score(inputs(2, ttv, iga)).tolist() == [1.75, 2.25, 2.75, 3.25]
    assert paper[1.0].score(inputs(2, ttv, iga)).tolist() == ttv.tolist()
    assert TransPrune(alpha=0.0).select(inputs(2, ttv, iga)).tolist() == [2, 3]
    assert TransPrune(alpha=1.0).select(inputs(2, ttv, iga)).tolist() == [0, 1]


def test_the_code_form_does_not_depend_on_the_scale_of_either_score():
    generator = torch.Generator().manual_seed(1)
    ttv, iga = (torch.rand(9, generator=generator) + 0.1 for _ in range(2))
    plain = TransPrune().score(inputs(3, ttv, iga))
    scaled = TransPrune().score(inputs(3, ttv * 50, iga * 0.02))
    torch.testing.assert_close(plain, scaled, **TOLERANCE)
    assert plain.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_a_cut_before_any_layer_goes_by_attention_alone(form):
    iga = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert TransPrune(form=form).select(inputs(2, None, iga)).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("score", "keep", "expected"),
    [
        pytest.param([1.0, 1.0, 1.0, 1.0], 2, [0, 1], id="all-tie"),
        pytest.param([0.0, 1.0, 2.0, 1.0, 1.0], 3, [1, 2, 3], id="tie-at-the-edge"),
        pytest.param([3.0, 1.0, 2.0], 3, [0, 1, 2], id="keep-all"),
        pytest.param([3.0, 1.0, 4.0], 1, [2], id="keep-one"),
        pytest.param([-1.0, -2.0, -3.0], 2, [0, 1], id="negative"),
    ],
)
def test_top_k_ascend_and_ties_keep_the_lower_index(score, keep, expected):
    score = torch.tensor(score)
    before = score.clone()
    ranks = top_k(score, keep)
    assert ranks.tolist() == expected
    assert ranks.dtype == torch.int64
    assert torch.equal(score, before)


def test_ties_keep_the_lower_index_beyond_the_small_sizes_of_sort():
    assert top_k(torch.zeros(5000), 700).tolist() == list(range(700))


def test_nan_ranks_lowest():
    assert top_k(torch.tensor([math.nan, -math.inf, 1.0, math.nan]), 3).tolist() == [0, 1, 2]
    assert top_k(torch.tensor([math.nan, -math.inf, 1.0]), 2).tolist() == [1, 2]


# an independent implementation, float64, fed as staged prefill feeds the policy


def reference_ttv(x_in, x_out, visual, form):
    norm_in, norm_out = np.linalg.norm(x_in, axis=1), np.linalg.norm(x_out, axis=1)
    cos = (x_in * x_out).sum(axis=1) / (norm_in * norm_out)
    direction = np.exp(1 - np.abs(cos) if form == "paper" else 1 - cos)
    pool = direction[visual] if form == "paper" else direction
    return (direction / pool.sum() * norm_out / norm_in)[visual]


def reference_iga(q, k, text_rows, visual):
    group = q.shape[0] // k.shape[0]
    rows = []
    for head in range(q.shape[0]):
        for row in text_rows:
            logits = k[head // group, : row + 1] @ q[head, row] / np.sqrt(q.shape[2])
            p = np.exp(logits - logits.max())
            full = np.zeros(len(visual))
            full[: row + 1] = p / p.sum()
            rows.append(full[visual])
    return np.mean(rows, axis=0)


def reference_keep(ttv, iga, keep, alpha, form):
    if form == "code":
        ttv, iga = ttv / (ttv.sum() + 1e-8), iga / (iga.sum() + 1e-8)
    score = alpha * ttv + (1 - alpha) * iga
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    gap = score[order[keep - 1]] - score[order[keep]]
    return sorted(order[:keep]), score, gap


class Prompt:
    """Random activations of a prompt with two images, for every layer and row."""

    def __init__(self, seed, spans=((3, 14), (17, 40)), num_rows=47, num_layers=6, dim=12):
        rng = np.random.default_rng(seed)
        self.spans, self.num_rows = spans, num_rows
        shape = (num_layers, 2, 2, num_rows, dim)
        self.parts = rng.normal(size=shape)
        # rows turn by different angles, so that the two forms differ
        self.parts[:, :, 1] += rng.normal(size=(num_rows, 1)) * self.parts[:, :, 0]
        self.q = rng.normal(size=(num_layers, 4, num_rows, 8))
        self.k = rng.normal(size=(num_layers, 2, num_rows, 8))

    def layout(self):
        return PromptLayout(self.num_rows, self.spans)


def prefill(prompt, policy, shape, ttv, iga, choose):
    """Run the cuts in the order of staged prefill; returns the kept positions after each."""
    plan = policy.plan(prompt.layout(), shape)
    alive = list(range(prompt.num_rows))
    visual = set(prompt.layout().visual_positions())
    num_text_after = prompt.layout().num_text_after
    accumulated, kept = None, []
    for layer in range(shape.num_layers):
        if layer in dict(plan.cuts):
            keep = plan.kept[shape.boundaries.index(layer)]
            mask = np.array([p in visual for p in alive])
            text = list(range(len(alive) - num_text_after, len(alive)))
            chosen = list(map(int, choose(accumulated, iga(layer, alive, text, mask), keep)))
            candidates = [p for p in alive if p in visual]
            visual = {candidates[i] for i in chosen}
            alive = [p for p in alive if p in visual or p not in candidates]
            accumulated = None if accumulated is None else accumulated[chosen]
            kept.append(sorted(visual))
        if layer in policy.observed_layers(shape):
            mask = np.array([p in visual for p in alive])
            for part in range(2):
                score = ttv(*prompt.parts[layer, part][:, alive], mask)
                accumulated = score if accumulated is None else accumulated + score
    return kept


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_two_stages_keep_what_an_independent_float64_implementation_keeps(form, alpha, seed):
    prompt, shape = Prompt(seed), EngineShape(6, (0, 2, 4), 4096)
    policy = TransPrune(form=form, alpha=alpha, prune_layers=[2, 4], keep_ratios=[0.6, 0.25])
    assert policy.observed_layers(shape) == range(4)
    scores = []

    def expected_choice(accumulated, attention, keep):
        chosen, score, gap = reference_keep(accumulated, attention, keep, alpha, form)
        assert gap > 1e-6, "the case does not separate the kept from the dropped; take another seed"
        scores.append(score)
        return chosen

    expected = prefill(
        prompt,
        policy,
        shape,
        lambda x_in, x_out, mask: reference_ttv(x_in, x_out, mask, form),
        lambda layer, alive, text, mask: reference_iga(
            prompt.q[layer][:, alive], prompt.k[layer][:, alive], text, mask
        ),
        expected_choice,
    )

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x)).float()

    def attention(layer, alive, text, mask):
        q, k = tensor(prompt.q[layer][:, alive][:, text]), tensor(prompt.k[layer][:, alive])
        return instruction_attention(
            q, k, torch.tensor(text), torch.from_numpy(mask), scale=8**-0.5
        )

    def choice(accumulated, attention, keep):
        cut = inputs(keep, accumulated, attention)
        torch.testing.assert_close(policy.score(cut), tensor(scores.pop(0)), **TOLERANCE)
        return policy.select(cut)

    actual = prefill(
        prompt,
        policy,
        shape,
        lambda x_in, x_out, mask: observed(
            policy, tensor(x_in), tensor(x_out), torch.from_numpy(mask)
        ),
        attention,
        choice,
    )
    assert [len(k) for k in actual] == [20, 8]
    assert actual == expected
