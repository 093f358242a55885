"""The engine's log-probs equal those of a transformers loop that drops the same rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.e2e.support import Engine
from tests.oracle.asks import COMPARE, DESCRIBE, Ask, visual
from tests.oracle.loop import Oracle
from tests.oracle.request import SHAPE, assert_like_oracle
from tokenprune.policies import SelectInputs
from tokenprune.policies.visual.transprune import TransPrune

pytestmark = pytest.mark.vllm


CASES = [
    pytest.param(DESCRIBE, (1,), None, id="off"),
    pytest.param(DESCRIBE, (1,), visual("uniform", 1), id="uniform-keeps-all"),
    pytest.param(DESCRIBE, (1,), visual("transprune", 1.0), id="transprune-keeps-all"),
    pytest.param(DESCRIBE, (1,), visual("uniform"), id="uniform"),
    pytest.param(DESCRIBE, (2,), visual("random", 0.1, seed=7), id="random"),
    pytest.param(DESCRIBE, (3,), visual("transprune", 0.125), id="transprune-published"),
    pytest.param(DESCRIBE, (4,), visual("transprune", 0.25, form="paper"), id="transprune-paper"),
    pytest.param(DESCRIBE, (4,), visual("transprune", 0.25, alpha=1.0), id="transprune-ttv"),
    pytest.param(DESCRIBE, (4,), visual("transprune", 0.25, alpha=0.0), id="transprune-iga"),
    pytest.param(COMPARE, (1, 2), visual("transprune"), id="two-images-transprune"),
    pytest.param(COMPARE, (3, 3), visual("uniform"), id="same-image-twice"),
    pytest.param(
        DESCRIBE, (5,), visual("uniform", 0.5, prune_layers=[0, 5]), id="cut-before-layer-0"
    ),
    pytest.param(
        DESCRIBE, (5,), visual("transprune", 0.3, prune_layers=[2, 3, 5]), id="three-cuts"
    ),
    pytest.param(DESCRIBE, (5,), visual("transprune", 0.01), id="one-token-left"),
]


@pytest.mark.parametrize(("prompt", "images", "pruning"), CASES)
def test_engine_equals_a_transformers_loop_with_the_same_rows_dropped(
    engine: Engine, oracle: Oracle, prompt: str, images: tuple[int, ...], pruning: Any
) -> None:
    ask = Ask(prompt, images, pruning, max_tokens=10)
    (answer,) = engine.ask(ask)
    assert_like_oracle(oracle, ask, answer)


def test_pruning_changes_the_answer_so_the_comparison_can_fail(engine: Engine) -> None:
    full, pruned = engine.ask(Ask(DESCRIBE, (3,)), Ask(DESCRIBE, (3,), visual("transprune", 0.125)))
    assert not full.agrees_with(pruned)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_engine_picks_the_rows_that_float64_scores_pick(
    engine: Engine, oracle: Oracle, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked: list[list[int]] = []
    select = TransPrune.select

    def recorded(self: TransPrune, inputs: SelectInputs) -> torch.Tensor:
        kept = select(self, inputs)
        picked.append(kept.tolist())
        return kept

    monkeypatch.setattr(TransPrune, "select", recorded)
    ask = Ask(COMPARE, (6, 7), visual("transprune", 0.2, form=form))
    (answer,) = engine.ask(ask)
    expected = assert_like_oracle(oracle, ask, answer).trace.kept
    ranks = list(range(2 * 144))
    found = {}
    for layer, local in zip(sorted(expected), picked, strict=True):
        ranks = [ranks[i] for i in local]
        found[layer] = ranks
    assert found == expected


def test_the_oracle_has_as_many_layers_as_the_shape_says(oracle: Oracle) -> None:
    assert len(oracle.decoder.layers) == SHAPE.num_layers
