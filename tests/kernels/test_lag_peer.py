"""Scores equal kvpress's LagKVPress on the same tensors; where policies differ is written down."""

import pytest
import torch

from tokenprune.kernels import lag_keep, lag_scores_reference

SINK, LAG = 4, 16


@pytest.fixture(scope="module")
def press(kvpress):
    return kvpress("presses.lagkv_press").LagKVPress


@pytest.fixture
def cache(generator):
    # the press takes no n off the partition size without a copy: 4 + 5 * 16 + 7
    n = SINK + 5 * LAG + 7
    offsets = 3 * torch.randn(2, 1, 3, 1, 8, generator=generator)
    return (torch.randn(2, 1, 3, n, 8, generator=generator) + offsets).unbind()


def scored(press, keys, values, **parameters):
    made = press(n_sink=SINK, lag_size=LAG, **parameters)
    return made.score(None, None, keys, values, None, None)


def test_scores_are_those_of_the_press(press, cache):
    keys, values = cache
    theirs = scored(press, keys, values, cross_scoring=True)
    ours = lag_scores_reference(keys[0], values[0], sink=SINK, lag=LAG)
    scored_tokens = theirs[0, :, SINK : SINK + 4 * LAG].reshape(3, 4, LAG)
    # the press takes the mean of the two terms, the paper their sum
    torch.testing.assert_close(2 * scored_tokens, ours, rtol=1e-6, atol=1e-8)
    assert (theirs[0, :, :SINK] == 1).all()
    assert (theirs[0, :, SINK + 4 * LAG :] == 1).all()


def test_the_press_ranks_within_partitions_as_we_do(press, cache):
    keys, values = cache
    ranks = scored(press, keys, values)[0, :, SINK : SINK + 4 * LAG].reshape(3, 4, LAG)
    ours = lag_scores_reference(keys[0], values[0], sink=SINK, lag=LAG)
    for keep in (1, 4, 8, 15):
        assert torch.equal(lag_keep(ranks.float().contiguous(), keep), lag_keep(ours, keep))


def test_below_two_partitions_the_press_still_evicts_and_we_do_not(press, cache):
    keys, values = (x[:, :, : SINK + 2 * LAG - 1] for x in cache)
    theirs = scored(press, keys, values)
    assert theirs.unique().numel() > 2
    assert lag_scores_reference(keys[0], values[0], sink=SINK, lag=LAG).shape == (3, 0, LAG)
