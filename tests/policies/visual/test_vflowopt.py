"""VFlowOpt: published budgets, the map, and which tokens of an image stay."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.errors import PolicyError
from tokenprune.lengths import PhysicalLengths, PromptLayout
from tokenprune.policies import CropInputs, ImageInputs, ImagePlan, PlanSkipped
from tokenprune.policies.visual.vflowopt import VFlowOpt, spread
from tokenprune.shape import EngineShape

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
# 28 layers cut where the paper cuts them
PUBLISHED = EngineShape(28, (0, 9, 18), 8192)


@pytest.mark.parametrize(
    ("keep_ratio", "stages"),
    [
        (0.5, [0.7233201448753168, 0.748747637472693, 0.487]),
        (0.25, [0.2651026358526424, 0.9833433139039235, 0.8773258179532721]),
        (0.1, [0.11661529508161146, 1.0, 0.6011]),
    ],
)
def test_a_published_budget_is_spread_as_published(keep_ratio, stages):
    asked = [share for _, share in VFlowOpt(stages=stages).cuts(PUBLISHED)]
    found = [share for _, share in VFlowOpt(keep_ratio=keep_ratio).cuts(PUBLISHED)]
    # the published budgets are met to three digits, ours to all
    assert found == pytest.approx(asked, rel=4e-3)
    assert (9 * found[0] + 9 * found[1] + 10 * found[2]) / 28 == pytest.approx(keep_ratio)


@PROPERTY
@given(st.floats(0.001, 1), st.tuples(st.integers(1, 30), st.integers(0, 30), st.integers(1, 30)))
def test_any_budget_is_the_mean_over_any_layers(keep_ratio, layers):
    shares = spread(keep_ratio, layers)
    assert all(0 < share <= 1 for share in shares)
    assert shares == sorted(shares, reverse=True)
    mean = sum(n * share for n, share in zip(layers, shares, strict=True)) / sum(layers)
    assert mean == pytest.approx(keep_ratio)


def test_keeping_everything_keeps_every_token():
    plan = VFlowOpt(keep_ratio=1).plan(PromptLayout(900, ((5, 734), (740, 883))), PUBLISHED)
    assert plan.images == (
        ImagePlan(((5, 734),), (729,) * 3),
        ImagePlan(((740, 883),), (143,) * 3),
    )
    assert PhysicalLengths(900, plan.dropped).all_stages(900) == (900,) * 3


def test_frames_with_text_between_them_are_one_video():
    prompt = PromptLayout(60, ((2, 12), (15, 25), (30, 40)), (2, 1))
    engine = EngineShape(8, (0, 2, 4, 6), 4096)
    plan = VFlowOpt(stages=[0.5, 1, 1], prune_layers=[2, 4]).plan(prompt, engine)
    assert [(i.spans, i.kept[0]) for i in plan.images] == [
        (((2, 12), (15, 25)), 10),
        (((30, 40),), 5),
    ]
    # a chunk ends before the video or after it, and the text between its frames is held
    assert [plan.chunk_end(n) for n in (2, 13, 24, 25, 30, 39)] == [2, 2, 2, 25, 30, 30]
    lengths = PhysicalLengths(60, plan.dropped)
    assert [lengths.physical(n, 0) for n in (2, 25, 30, 40, 60)] == [2, 15, 20, 25, 45]
    with pytest.raises(PlanSkipped, match="image_exceeds_batch"):
        VFlowOpt().plan(prompt, EngineShape(8, (0, 2, 4, 6), 22))


@pytest.mark.parametrize(
    ("engine", "layers"),
    [
        pytest.param(PUBLISHED, [0, 9, 18], id="28-layers"),
        pytest.param(EngineShape(32, (0, 8, 12, 20), 4096), [0, 12, 20], id="32-layers"),
        pytest.param(EngineShape(8, (0, 2, 3, 5), 4096), [0, 3, 5], id="8-layers"),
        pytest.param(EngineShape(8, (0, 4), 4096), [0, 4], id="both-cuts-on-one-boundary"),
    ],
)
def test_published_layers_snap_to_boundaries(engine, layers):
    cuts = VFlowOpt(stages=[0.5, 0.5, 0.5]).cuts(engine)
    assert [layer for layer, _ in cuts] == layers
    assert [share for _, share in cuts] == [*[0.5, 0.25][: len(layers) - 1], 0.125]


def test_own_layers_replace_the_published_ones():
    engine = EngineShape(8, (0, 2, 3, 5), 4096)
    policy = VFlowOpt(stages=[0.5, 0.5, 0.5], prune_layers=[2, 5])
    assert policy.cuts(engine) == ((0, 0.5), (2, 0.25), (5, 0.125))
    plan = policy.plan(PromptLayout(60, ((2, 42), (50, 55))), engine)
    assert [image.kept for image in plan.images] == [(20, 10, 10, 5), (2, 1, 1, 1)]
    assert plan.kept == (22, 11, 11, 6)
    with pytest.raises(PolicyError, match=r"\[0, 2, 3, 5\], got \[4\]"):
        VFlowOpt(prune_layers=[2, 4]).cuts(engine)


def crop(generator, n=36, heads=2):
    q, k = (torch.randn(heads, n, 8, generator=generator) * 2 for _ in range(2))
    pixels = torch.randint(0, 4, (3, 24, 24), generator=generator).to(torch.uint8) * 60
    return CropInputs(q, k, 8**-0.5, lambda: pixels, 4)


@pytest.mark.parametrize("alpha", [0.0, 0.7, -0.7])
def test_the_map_adds_entropy_with_its_sign(alpha):
    inputs = crop(torch.Generator().manual_seed(3))
    attention = torch.softmax(
        inputs.query.double() @ inputs.key.double().mT * inputs.scale, dim=-1
    ).mean(0)
    keys = attention.sum(0) > 1.4
    assert 0 < int(keys.sum()) < 36
    grey = (inputs.pixels().long().sum(0) // 3).view(6, 4, 6, 4).transpose(1, 2).reshape(36, 16)
    entropy = torch.zeros(36, dtype=torch.float64)
    for i, patch in enumerate(grey):
        share = patch.bincount()[patch.bincount() > 0].double() / 16
        entropy[i] = -(share * share.log2()).sum()
    expected = attention[keys].sum(0) + alpha * entropy.softmax(0)
    actual = VFlowOpt(threshold=1.4, alpha=alpha).score_crop(inputs)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)


def test_pixels_are_left_alone_where_entropy_weighs_nothing():
    inputs = crop(torch.Generator().manual_seed(3))

    def unwanted():
        raise AssertionError("no pixels are needed")

    VFlowOpt().score_crop(CropInputs(inputs.query, inputs.key, inputs.scale, unwanted, 4))


def test_equal_keys_mean_equal_maps():
    assert VFlowOpt(cell=2.0).score_key() == VFlowOpt(keep_ratio=0.7).score_key()
    assert len({VFlowOpt(threshold=t, alpha=a).score_key() for t in (1, 2) for a in (0, 1)}) == 4


def image(kept, *, is_video=False, grids=((16, 4),), separators=()):
    n = sum(tokens for tokens, _ in grids)
    generator = torch.Generator().manual_seed(n)
    importance = torch.rand(n, generator=generator)
    importance[list(separators)] = math.inf
    features = torch.randn(n, 3, generator=generator)
    return ImageInputs(kept, features, importance, grids, is_video)


@pytest.mark.parametrize("is_video", [False, True], ids=["image", "video"])
@pytest.mark.parametrize(
    "kept", [(16, 16, 16), (9, 9, 4), (9, 5, 1), (1, 1, 1), (3, 2, 2)], ids=str
)
def test_stages_keep_what_the_plan_counts_the_most_important_last(kept, is_video):
    inputs = image(kept, is_video=is_video)
    stages, features = VFlowOpt(cell=2).select_image(inputs)
    assert [len(stage) for stage in stages] == list(kept)
    assert features.shape == (kept[0], 3)
    outer = torch.arange(16)
    for stage in stages:
        assert torch.isin(stage, outer).all()
        assert torch.equal(stage, stage.sort().values)
        outer = stage
    for before, after in itertools.pairwise(stages):
        gone = before[~torch.isin(before, after)]
        if len(gone):
            assert inputs.importance[gone].max() < inputs.importance[after].min()


def test_an_image_merges_what_it_drops_and_a_video_does_not():
    inputs = image((8, 8))
    (kept, _), features = VFlowOpt(cell=2).select_image(inputs)
    assert not torch.equal(features, inputs.features[kept])
    (kept, _), features = VFlowOpt(cell=2).select_image(image((8, 8), is_video=True))
    assert torch.equal(features, inputs.features[kept])
    best = sorted(range(16), key=lambda i: -inputs.importance[i])[:8]
    assert kept.tolist() == sorted(best)


def test_separators_stay_as_long_as_there_is_room_and_are_never_merged():
    grids, separators = ((4, 2), (6, 3)), (6, 9)
    for kept in ((9, 5), (4, 2), (2, 1)):
        inputs = image(kept, grids=grids, separators=separators)
        stages, features = VFlowOpt(cell=1).select_image(inputs)
        for stage in stages:
            there = [i for i in stage.tolist() if i in separators]
            assert there == list(separators)[: len(stage)]
        at = stages[0].tolist().index(6)
        assert torch.equal(features[at], inputs.features[6])


def test_a_cell_is_half_a_crop_unless_it_is_given():
    inputs = image((4, 4))
    ours, _ = VFlowOpt().select_image(inputs)
    same, _ = VFlowOpt(cell=2).select_image(inputs)
    other, _ = VFlowOpt(cell=100).select_image(inputs)
    assert ours[0].tolist() == same[0].tolist()
    # one token for each quarter; with one cell the three most important and one for the rest
    assert {i // 8 * 2 + i % 4 // 2 for i in ours[0].tolist()} == {0, 1, 2, 3}
    assert ours[0].tolist() != other[0].tolist()
