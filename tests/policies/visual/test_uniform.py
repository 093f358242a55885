"""Uniform: even distances, equal margins."""

import itertools

import pytest

from tokenprune.lengths import PromptLayout
from tokenprune.policies.visual.uniform import UniformVisual
from tokenprune.shape import EngineShape


@pytest.mark.parametrize(
    ("num_visual", "keep", "expected"),
    [
        pytest.param(8, 4, [1, 3, 5, 7], id="every-second"),
        pytest.param(9, 3, [1, 4, 7], id="middles-of-thirds"),
        pytest.param(7, 1, [3], id="the-middle"),
        pytest.param(2, 1, [1], id="one-of-two"),
        pytest.param(5, 4, [0, 1, 3, 4], id="all-but-one"),
        pytest.param(4, 4, [0, 1, 2, 3], id="all"),
        pytest.param(1, 1, [0], id="single"),
    ],
)
def test_ranks(num_visual, keep, expected):
    assert UniformVisual().keep_ranks(num_visual, keep) == expected


@pytest.mark.parametrize("num_visual", [1, 2, 13, 64, 577])
def test_distances_differ_by_at_most_one_and_margins_are_equal(num_visual):
    for keep in range(1, num_visual + 1):
        ranks = UniformVisual().keep_ranks(num_visual, keep)
        distances = {b - a for a, b in itertools.pairwise(ranks)}
        assert not distances or max(distances) - min(distances) <= 1
        assert abs(ranks[0] - (num_visual - 1 - ranks[-1])) <= 1


def test_tokens_count_in_prompt_order_over_all_images():
    prompt = PromptLayout(12, ((1, 5), (7, 11)))
    policy = UniformVisual(prune_layers=[2], keep_ratio=0.5)
    plan = policy.plan(prompt, EngineShape(4, (0, 2), 64))
    assert plan.ranks == (tuple(range(8)), (1, 3, 5, 7))
    assert [d.positions for d in plan.dropped] == [(), (1, 3, 7, 9)]
