"""LagKV: the released defaults, and which tokens stand out."""

import pytest
import torch

from tests.policies.kv.segments import segments
from tokenprune.kernels import lag_keep
from tokenprune.policies.kv.lagkv import LagKV


def test_defaults_are_those_of_the_released_class():
    policy = LagKV()
    assert (policy.sink, policy.lag, policy.keep_ratio, policy.when) == (
        16,
        1024,
        0.5,
        "prompt_end",
    )


def test_a_token_far_from_what_follows_it_stands_out():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 32, 6, generator=generator)
    keys[:, 5] += 40 * torch.arange(6)
    scores = LagKV().score(segments(keys=keys, values=values))
    assert scores.shape == (2, 3, 8)
    assert lag_keep(scores, 1)[:, 0, 0].tolist() == [5, 5]


def test_keys_and_values_must_be_there():
    with pytest.raises(TypeError, match="set reads_cache"):
        LagKV().score(segments())
