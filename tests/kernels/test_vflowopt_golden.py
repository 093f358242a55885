"""The worked example of the specification: four patches of an image, and a grid of sixteen."""

import json
from pathlib import Path

import pytest
import torch

from tokenprune.kernels import (
    attention_importance,
    attention_importance_reference,
    patch_entropy,
    patch_entropy_reference,
    recycle,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture
def golden():
    return json.loads((Path(__file__).parents[1] / "golden" / "vflowopt.json").read_text())


@pytest.fixture
def pixels(golden, device):
    rows = [[p if isinstance(p, list) else [p] * 3 for p in row] for row in golden["VF.pixels"]]
    return torch.tensor(rows, dtype=torch.uint8, device=device).permute(2, 0, 1)


@pytest.fixture
def qk(golden, device):
    # softmax(log A) is A, so these queries and keys have the attention of the example
    q = torch.tensor(golden["VF.heads"], dtype=torch.float64, device=device).log()
    return q, torch.eye(4, dtype=torch.float64, device=device).expand(2, 4, 4)


def test_entropy_of_the_reference(golden, pixels, assert_matches):
    assert_matches(patch_entropy_reference(pixels, 2), golden["vf.entropy_bits"], **EXACT)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_entropy(golden, pixels, assert_matches, backend):
    actual = patch_entropy(pixels, 2, backend=backend)
    assert actual.dtype == torch.float32
    assert_matches(actual, golden["vf.entropy_bits"], **FLOAT32)
    # the released code loses the first patch, whose two values are 128 apart
    assert actual[0] > golden["vf.entropy_released_bits(aliasing bug)"][0] + 0.9


FORMS = {
    "sum": "vf.importance(paper, alpha=.5)",
    "mean": "vf.importance(released_reduction, alpha=.5)",
}


@pytest.mark.parametrize("reduction", FORMS)
def test_importance_of_the_reference(golden, qk, assert_matches, reduction):
    attention = attention_importance_reference(*qk, threshold=1.05, scale=1.0, reduction=reduction)
    entropy = attention.new_tensor(golden["vf.softmax(entropy_bits)"])
    assert_matches(attention + 0.5 * entropy, golden[FORMS[reduction]], **EXACT)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", FORMS)
def test_importance(golden, qk, assert_matches, reduction, backend):
    q, k = (x.float() for x in qk)
    attention = attention_importance(
        q, k, threshold=1.05, scale=1.0, reduction=reduction, backend=backend
    )
    entropy = attention.new_tensor(golden["vf.softmax(entropy_bits)"])
    assert_matches(attention + 0.5 * entropy, golden[FORMS[reduction]], **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_recycling(golden, device, assert_matches, backend, dtype):
    importance = torch.tensor(golden["VF.recycle.importance"], dtype=dtype, device=device)
    i = torch.arange(16, dtype=dtype, device=device)
    features = torch.stack([i, (i - 8) ** 2 / 8], dim=1)
    kept, folded = recycle(features, importance, 4, 8, 2, backend=backend)
    assert kept.tolist() == golden["vf.recycle.kept"]
    assert_matches(importance[kept], golden["vf.recycle.kept_importance(carried to later stages)"])
    slots = {}
    for cell in ("(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)"):
        slot = golden[f"vf.recycle.cell{cell}.slot"]
        slots[slot] = golden[f"vf.recycle.cell{cell}.feature"]
    for row, token in enumerate(kept.tolist()):
        expected = slots.get(token, features[token].tolist())
        tolerance = EXACT if dtype == torch.float64 and backend == "torch" else FLOAT32
        assert_matches(folded[row], expected, **tolerance)
