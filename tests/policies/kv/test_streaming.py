"""Streaming: the newer a token, the higher its score, over all partitions."""

import torch

from tests.policies.kv.segments import segments
from tokenprune.policies.kv.streaming import Streaming


def test_scores_are_places_counted_from_the_sink():
    scores = Streaming().score(segments(first=2))
    assert scores.shape == (2, 3, 8)
    assert torch.equal(scores[0], scores[1])
    assert scores[0].flatten().tolist() == list(range(16, 40))
