"""What a full graph would replay: its buffers stay where they are, and say what a step says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.e2e.contract import CHANNEL_ASKS
from tests.e2e.support import ROUNDING, Engine
from tests.oracle.asks import STORY, TEXT, Ask, kv

pytestmark = pytest.mark.vllm


def test_the_buffers_that_graphs_read_stay_where_they_are(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine.runner
    state = runner.model_state
    prepare, addresses, lengths = state.prepare_attn, set(), []

    def watched(batch: Any, mode: Any, tables: Any, slots: Any, *args: Any, **kwargs: Any) -> Any:
        batches = state.step.batches if state.step else [batch] * len(state._groups)
        graphs = [state._persistent(s, b).seq_lens for s, b in enumerate(batches)]
        for graph, stage in zip(graphs, batches, strict=True):
            assert graph.tolist() == stage.seq_lens.tolist()
        addresses.add(
            (
                *(g.data_ptr() for g in graphs),
                *(t.data_ptr() for t in tables),
                *(s.data_ptr() for s in slots),
                runner._behind_on_device.data_ptr(),
            )
        )
        lengths.append(int(graphs[0][0]))
        return prepare(batch, mode, tables, slots, *args, **kwargs)

    monkeypatch.setattr(state, "prepare_attn", watched)
    engine.ask(Ask(STORY, (), kv("lagkv"), 40), Ask(TEXT, max_tokens=9))
    assert len(addresses) == 1
    assert any(b < a - 1 for a, b in itertools.pairwise(lengths)), "nothing was evicted"


def test_what_full_graphs_read_says_the_same_at_the_same_place(
    packing_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing_engine.llm.reset_prefix_cache()
    without = packing_engine.ask(*CHANNEL_ASKS)
    packing_engine.llm.reset_prefix_cache()
    runner = packing_engine.runner
    pruner, prepare, addresses, packed = runner._channels, runner.prepare_attn, set(), []

    def persistent(batch: Any) -> Any:
        tables = prepare(batch)
        if batch.num_tokens == batch.num_reqs:
            # a step that a full graph could replay; the CPU has none, so the buffer is all there is
            fresh = [None if rows is None else rows.clone() for rows in pruner._rows]
            pruner.persist(batch.num_reqs)
            for rows, kept in zip(fresh, pruner._rows, strict=True):
                used = kept[kept[:, 0] >= 0]
                assert used.tolist() == ([] if rows is None else rows.tolist())
                packed.append(len(used))
                addresses.add(kept.data_ptr())
        return tables

    monkeypatch.setattr(runner, "prepare_attn", persistent)
    for answer, expected in zip(packing_engine.ask(*CHANNEL_ASKS), without, strict=True):
        assert answer.agrees_with(expected, ROUNDING)
    assert len(addresses) == len(pruner._rows)
    assert max(packed) >= 3
