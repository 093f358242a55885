"""A scheduler that counts other than the worker stops the engine before it reads a wrong cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.support import Engine, internal_id, start, step
from tests.oracle.asks import DESCRIBE, STORY, Ask, kv, visual
from tokenprune.errors import DivergenceError

pytestmark = pytest.mark.vllm


def test_a_scheduler_that_counts_otherwise_stops_the_engine_before_it_writes(
    checkpoint: Path,
) -> None:
    engine = Engine(checkpoint)
    try:
        request_id = internal_id(engine, start(engine, Ask(DESCRIBE, (1,), visual("uniform"))))
        plans = engine.scheduler._plans
        dropped = plans[request_id].lengths.dropped
        wrong = replace(plans[request_id].lengths, dropped=(dropped[0], *dropped[:-1]))
        plans[request_id] = replace(plans[request_id], lengths=wrong)
        with pytest.raises(DivergenceError, match=request_id):
            step(engine)
    finally:
        engine.close()


def test_a_scheduler_that_forgets_to_free_stops_the_engine(checkpoint: Path) -> None:
    # with a prefix cache the row moves to as many blocks as it needs
    engine = Engine(checkpoint, prune_layers=[], enable_prefix_caching=False)
    try:
        request_id = start(engine, Ask(STORY, (), kv("lagkv"), max_tokens=20))
        for manager in engine.scheduler._managers:
            manager.free_emptied = lambda *_: None
        # the prompt, which evicts
        step(engine)
        with pytest.raises(DivergenceError, match=request_id):
            step(engine)
    finally:
        engine.close()
