"""Random: the draw depends on the seed and the counts, and on nothing else."""

import random

import pytest

from tokenprune.policies.visual.random import RandomVisual


def test_the_same_seed_draws_the_same_tokens_whatever_was_drawn_before():
    first = RandomVisual(seed=3).keep_ranks(576, 72)
    random.seed(1)
    random.random()
    assert RandomVisual(seed=3).keep_ranks(576, 72) == first


def test_the_global_generator_is_left_alone():
    random.seed(7)
    expected = random.random()
    random.seed(7)
    RandomVisual().keep_ranks(100, 10)
    assert random.random() == expected


def test_another_seed_draws_other_tokens():
    draws = {tuple(RandomVisual(seed=s).keep_ranks(576, 72)) for s in range(20)}
    assert len(draws) == 20


def test_the_draw_is_the_one_of_every_process_and_release():
    # API process, scheduler and worker may run different Python builds
    assert RandomVisual().keep_ranks(10, 4) == [1, 4, 7, 8]


def test_every_token_has_the_same_chance():
    seen = [0] * 10
    for seed in range(2000):
        for rank in RandomVisual(seed=seed).keep_ranks(10, 3):
            seen[rank] += 1
    # binomial, mean 600, standard deviation 20.5
    assert min(seen) > 600 - 5 * 20.5
    assert max(seen) < 600 + 5 * 20.5


@pytest.mark.parametrize("seed", [-1, 1.5, True, "1", None])
def test_a_seed_that_is_no_natural_number_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        RandomVisual(seed=seed)
