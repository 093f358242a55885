"""Engines in which nothing can be pruned: vLLM's own scheduler and worker serve them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.other_checkpoints import build
from tests.e2e.support import Engine
from tests.oracle.asks import STORY, TEXT, Ask, kv, visual

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("deepseek_v3", {}, id="one-latent-per-token"),
        # vLLM's kernel for linear attention on a CPU takes nothing else
        pytest.param("qwen3_5", {"dtype": "bfloat16"}, id="hybrid"),
    ],
)
def test_nothing_is_refused_and_nothing_of_ours_takes_part(
    checkpoint: Path, tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    model = build(name, checkpoint, tmp_path / name)
    engine = Engine(model, limit_mm_per_prompt={}, **arguments)
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
