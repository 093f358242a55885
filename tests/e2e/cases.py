"""Requests whose answers are compared with the oracle, one for each way to evict and to pack."""

from __future__ import annotations

from typing import Any

import pytest

from tests.oracle.asks import COMPARE, DESCRIBE, STORY, Ask, channels, kv, visual

EVICTED = [
    pytest.param(STORY, (), kv("lagkv"), id="lagkv-text"),
    pytest.param(STORY, (), kv("lagkv", 0.5, sink=0, lag=17), id="lagkv-no-sink-odd-lag"),
    pytest.param(STORY, (), kv("lagkv", 1.0), id="lagkv-keeps-all"),
    pytest.param(STORY, (), kv("lagkv", 0.01, lag=24), id="lagkv-one-token-left"),
    pytest.param(STORY, (), kv("streaming"), id="streaming"),
    pytest.param(STORY, (), kv("random", seed=3), id="random"),
    pytest.param(DESCRIBE, (1,), kv("lagkv"), id="lagkv-image"),
    pytest.param(COMPARE, (1, 2), kv("lagkv") | visual("uniform"), id="with-uniform"),
    pytest.param(COMPARE, (1, 2), kv("lagkv") | visual("transprune", 0.125), id="with-transprune"),
    pytest.param(
        COMPARE,
        (1, 2),
        kv("lagkv") | visual("vflowopt", 0.3, threshold=1.5, alpha=0.3),
        id="with-vflowopt",
    ),
    pytest.param(
        DESCRIBE, (3,), kv("streaming") | visual("random", 0.1), id="streaming-with-random"
    ),
]

PACKED = [
    pytest.param(STORY, (), channels(), id="half-of-the-keys"),
    pytest.param(STORY, (), channels(0.25), id="a-quarter-of-the-keys"),
    pytest.param(STORY, (), channels(0.75, values_keep_ratio=0.25), id="values-too"),
    pytest.param(STORY, (), channels(pack_generated=False), id="generated-tokens-stay"),
    pytest.param(STORY, (), channels(window=1, recent=0), id="one-query-and-none-recent"),
    pytest.param(STORY, (), channels() | kv("lagkv", 0.5), id="with-lagkv"),
    pytest.param(
        STORY, (), channels(values_keep_ratio=0.5) | kv("lagkv", 0.75), id="values-with-lagkv"
    ),
    pytest.param(DESCRIBE, (1,), channels(), id="image"),
    pytest.param(COMPARE, (1, 2), channels() | visual("uniform", 0.5), id="with-uniform"),
    pytest.param(
        COMPARE,
        (1, 2),
        channels() | kv("lagkv", 0.5) | visual("transprune", 0.5),
        id="all-three-axes",
    ),
    pytest.param(
        COMPARE,
        (1, 2),
        channels() | kv("lagkv", 0.5) | visual("vflowopt", 0.7, threshold=1.5),
        id="all-three-axes-vflowopt",
    ),
]


def ask_of(case: Any, max_tokens: int = 40) -> Ask:
    """Return the request of a case."""
    return Ask(*case.values, max_tokens=max_tokens)
