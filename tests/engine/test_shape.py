"""Sizes that costs are counted from."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tokenprune.engine.shape import _mlp_width


@pytest.mark.parametrize(
    ("sizes", "width"),
    [
        pytest.param({"intermediate_size": 128}, 128, id="dense"),
        pytest.param({}, 0, id="unknown"),
        pytest.param(
            {"intermediate_size": 128, "moe_intermediate_size": 48, "num_experts_per_tok": 2},
            96,
            id="experts",
        ),
        pytest.param(
            {
                "moe_intermediate_size": 48,
                "num_experts_per_tok": 2,
                "shared_expert_intermediate_size": 32,
            },
            128,
            id="and-a-shared-one",
        ),
    ],
)
def test_a_token_passes_its_experts_not_the_dense_width(sizes, width):
    assert _mlp_width(SimpleNamespace(**sizes)) == width
