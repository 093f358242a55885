"""Scores of images are kept beside vLLM's encoder outputs, and leave with them."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from tokenprune.engine.families.base import ImageScores
from tokenprune.engine.visual import image_scores
from tokenprune.engine.visual.image_scores import ImageScorer, Scorable, ScoredEncoderCache


def test_outputs_and_scores_leave_the_cache_together():
    cache, found = ScoredEncoderCache(), ImageScores(torch.ones(1), ((1, 1),), False)
    for name in ("a", "b"):
        cache.encoder_outputs[name] = torch.ones(1, 1)
        cache.scores[name] = {(): found}
        cache.scorable[name] = Scorable([], lambda scores: found)
    cache.free_encoder_cache("a")
    assert set(cache.scores) == set(cache.scorable) == set(cache.encoder_outputs) == {"b"}
    cache.free_encoder_cache("never there")
    cache.reset_encoder_cache()
    assert not cache.scores
    assert not cache.scorable
    assert not cache.encoder_outputs


class Policy(SimpleNamespace):
    def score_key(self):
        return self.key


def test_an_image_has_at_most_so_many_scores_and_the_oldest_goes_first(monkeypatch):
    scorer = object.__new__(ImageScorer)
    scorer._cache = ScoredEncoderCache()
    encoded, scored = [], []

    def encode(self, feature):
        encoded.append(feature.identifier)
        return Scorable([], lambda scores: scores)

    def score(self, image, policy):
        scored.append(policy.key)
        return ImageScores(torch.ones(1), ((1, 1),), False)

    monkeypatch.setattr(ImageScorer, "_encode", encode)
    monkeypatch.setattr(ImageScorer, "_scored", score)
    feature = SimpleNamespace(identifier="a")
    for key in range(image_scores.MAX_SCORES + 1):
        scorer.scores_of(feature, Policy(key=key))
        scorer.scores_of(feature, Policy(key=key))
    assert scored == list(range(image_scores.MAX_SCORES + 1))
    assert list(scorer._cache.scores["a"]) == scored[1:]
    # whatever a client asks for, the tower runs once for it
    assert encoded == ["a"]
