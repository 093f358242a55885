"""Engines in which nothing can be pruned: vLLM's own scheduler and worker serve them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.other_checkpoints import build
from tests.e2e.support import Engine
from tests.oracle.asks import STORY, TEXT, Ask, kv, visual

pytestmark = pytest.mark.vllm


def test_nothing_is_refused_and_nothing_of_ours_takes_part(
    checkpoint: Path, tmp_path: Path
) -> None:
    # its cache holds one latent per token (MLA)
    model = build("deepseek_v3", checkpoint, tmp_path / "deepseek_v3")
    engine = Engine(model, limit_mm_per_prompt={})
    try:
        assert type(engine.scheduler).__module__.startswith("vllm.")
        assert type(engine.runner).__module__.startswith("vllm.")
        asks = [Ask(STORY, max_tokens=12), Ask(TEXT, max_tokens=12)]
        plain = engine.ask(*asks)
        asked = [Ask(a.prompt, (), kv("lagkv") | visual("uniform"), 12) for a in asks]
        assert engine.ask(*asked) == plain
        assert len({tuple(answer.tokens) for answer in plain}) == len(plain)
    finally:
        engine.close()
