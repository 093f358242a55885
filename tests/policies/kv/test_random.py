"""Random: the draw depends on seed, layer, head and token, and on nothing else."""

import torch

from tests.policies.kv.segments import segments
from tokenprune.kernels import lag_keep
from tokenprune.policies.kv.random import RandomKV


def kept(policy, keep=3, **changes):
    return lag_keep(policy.score(segments(**changes)), keep)


def test_random_draws_again_for_each_layer_head_and_partition_and_only_for_them():
    drawn = kept(RandomKV(seed=5))
    assert drawn.shape == (2, 3, 3)
    # a partition is drawn alike whichever it is cut down with
    alone = kept(RandomKV(seed=5), num_partitions=1, first=2)
    assert torch.equal(drawn[:, 2:], alone)
    others = [kept(RandomKV(seed=6)), kept(RandomKV(seed=5), layer=2)]
    assert not any(torch.equal(drawn, other) for other in others)
    assert len({tuple(row) for row in drawn.flatten(0, 1).tolist()}) > 1


def test_random_is_even():
    many = kept(RandomKV(), 2, num_partitions=4000)
    share = torch.bincount(many.flatten(), minlength=8) / many.numel()
    assert share.sub(1 / 8).abs().max() < 0.01


def test_a_huge_seed_is_a_seed():
    a, b = (kept(RandomKV(seed=s), num_partitions=50) for s in (2**40 + 1, 2**40 + 2))
    assert not torch.equal(a, b)
