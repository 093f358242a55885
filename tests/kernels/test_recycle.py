import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle.recycling import recycled
from tokenprune.kernels import recycle, recycle_reference

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def cases(draw):
    grids = draw(st.lists(st.tuples(st.integers(1, 14), st.integers(1, 5)), min_size=1, max_size=3))
    n = sum(tokens for tokens, _ in grids)
    # few distinct values, so that there are ties; infinite ones stay
    values = st.sampled_from([-0.5, 0.0, 0.1, 0.25, 0.5, 0.75, 1.5, math.inf])
    importance = draw(st.lists(values, min_size=n, max_size=n))
    cell = draw(st.sampled_from([0.5, 1, 1.5, 2, 2.7, 100]))
    return grids, importance, draw(st.integers(1, n)), cell


@PROPERTY
@given(cases())
def test_reference_follows_the_words(case):
    grids, importance, keep, cell = case
    n = len(importance)
    features = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    kept, folded = recycle_reference(
        features, torch.tensor(importance, dtype=torch.float64), grids, keep, cell
    )
    expected_kept, expected = recycled(features.tolist(), importance, grids, keep, cell)
    assert kept.tolist() == expected_kept
    assert len(kept) == keep
    torch.testing.assert_close(
        folded, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "d", "width", "keep", "cell"),
    [
        pytest.param(1, 1, 1, 1, 1, id="one-of-each"),
        pytest.param(49, 17, 7, 12, 3, id="prime-width"),
        pytest.param(49, 17, 7, 49, 3, id="keeps-all"),
        pytest.param(49, 17, 7, 1, 2, id="fewer-rows-than-cells"),
        pytest.param(64, 1100, 8, 20, 2.5, id="several-blocks-of-columns"),
        pytest.param(60, 16, 9, 20, 4, id="ragged-last-row"),
    ],
)
def test_kernel_matches_reference(
    generator, device, assert_matches, n, d, width, keep, cell, dtype
):
    features = torch.randn(n, d, generator=generator).to(device, dtype)
    importance = torch.rand(n, generator=generator).to(device)
    kept, folded = recycle(features, importance, width, keep, cell, backend="triton")
    expected_kept, expected = recycle_reference(
        features.double(), importance.double(), width, keep, cell
    )
    assert torch.equal(kept, expected_kept)
    assert folded.dtype == dtype
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
    assert_matches(folded.double(), expected, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tokens_that_stay_come_out_bit_for_bit(generator, device, backend):
    features = torch.randn(36, 40, generator=generator).to(device)
    importance = torch.rand(36, generator=generator).to(device)
    for keep in (10, 30, 36):
        kept, folded = recycle(features, importance, 6, keep, 3, backend=backend)
        same = (folded == features[kept]).all(dim=1)
        # at most four cells hold folded tokens
        assert int(same.sum()) >= keep - 4
        assert bool(same.all()) == (keep == 36)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_of_infinite_importance_folds_nothing_and_is_folded_into_nothing(device, backend):
    features = torch.arange(6.0, device=device)[:, None]
    importance = torch.tensor([0.1, 0.2, math.inf, 0.3, 0.4, math.inf], device=device)
    kept, folded = recycle(features, importance, 3, 3, 10, backend=backend)
    assert kept.tolist() == [2, 4, 5]
    torch.testing.assert_close(
        folded[:, 0].cpu(), torch.tensor([2.0, (0.2 + 0.9 + 1.6) / 1.0, 5.0])
    )
    kept, folded = recycle(features, importance, 3, 1, 10, backend=backend)
    assert (kept.tolist(), folded[0, 0].item()) == ([2], 2.0)


def test_cells_do_not_span_two_grids(device):
    features = torch.arange(8.0, device=device)[:, None]
    importance = torch.ones(8, device=device)
    one, _ = recycle(features, importance, 2, 2, 100)
    assert one.tolist() == [0, 1]
    kept, folded = recycle(features, importance, [(4, 2), (4, 2)], 2, 100)
    assert kept.tolist() == [0, 4]
    assert folded[:, 0].tolist() == [1.5, 5.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"features": torch.ones(4)}, "features must be 2-D", id="one-dimension"),
        pytest.param({"features": torch.ones(4, 2).long()}, "float dtype", id="integers"),
        pytest.param({"features": torch.ones(0, 2)}, "not empty", id="no-token"),
        pytest.param({"importance": torch.ones(3)}, r"importance must be float \[4\]", id="length"),
        pytest.param({"importance": torch.ones(4).long()}, "importance must be", id="dtype"),
        pytest.param({"grid_width": 0}, "grids must hold the 4 tokens", id="no-width"),
        pytest.param({"grid_width": [(2, 2)]}, "grids must hold the 4 tokens", id="too-few"),
        pytest.param({"keep": 0}, r"keep must be within 1..4, got 0", id="keep-none"),
        pytest.param({"keep": 5}, r"keep must be within 1..4, got 5", id="keep-more"),
        pytest.param({"cell": 0}, "cell must be", id="no-cell"),
        pytest.param({"cell": math.nan}, "cell must be", id="nan"),
        pytest.param({"backend": "numpy"}, "backend must be one of", id="backend"),
    ],
)
def test_bad_inputs_are_refused(change, message):
    good = {
        "features": torch.ones(4, 2),
        "importance": torch.ones(4),
        "grid_width": 2,
        "keep": 2,
        "cell": 2,
    }
    with pytest.raises(ValueError, match=message):
        recycle(**(good | change))
