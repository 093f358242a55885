import math

import pytest
import torch

from tokenprune.kernels import attention_importance, attention_importance_reference
from tokenprune.kernels.ops import attention_importance as module

SHAPES = [  # h, n, dh
    pytest.param(1, 1, 2, id="one-of-each"),
    pytest.param(3, 37, 32, id="prime-number-of-patches"),
    pytest.param(2, 64, 64, id="exactly-one-tile"),
    pytest.param(2, 65, 64, id="one-past-a-tile"),
    pytest.param(3, 144, 24, id="three-tiles"),
    pytest.param(2, 49, 72, id="siglip-head"),
    pytest.param(2, 33, 256, id="wide-heads-and-short-tiles"),
]
# of random patches some, none or all receive more than this many times the mean
THRESHOLDS = {"some": 1.3, "none": 1e6, "all": 0.0}


@pytest.fixture
def make_case(generator, device):
    def make(h, n, dh, dtype=torch.float32):
        q = torch.randn(h, n, dh, generator=generator)
        # some keys are longer, so that they are attended to by many
        k = torch.randn(h, n, dh, generator=generator) * torch.linspace(1, 3, n)[:, None]
        return [x.to(device, dtype) for x in (q, k)], {"scale": dh**-0.5}

    return make


def _map(q, k, scale):
    return torch.softmax(q.double() @ k.double().transpose(1, 2) * scale, dim=-1).mean(0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS)
def test_reference_follows_the_formula(make_case, assert_matches, threshold, reduction):
    (q, k), options = make_case(3, 40, 12, torch.float64)
    attention = _map(q, k, **options)
    keys = [j for j in range(40) if float(attention[:, j].sum()) > threshold]
    rows = attention[keys] if keys else attention
    expected = rows.sum(0) if keys and reduction == "sum" else rows.mean(0)
    actual = attention_importance_reference(
        q, k, threshold=threshold, reduction=reduction, **options
    )
    assert_matches(actual, expected, rtol=1e-12, atol=1e-15)
    assert (len(keys) == 0) == (threshold == THRESHOLDS["none"])
    assert (len(keys) == 40) == (threshold == THRESHOLDS["all"])


@pytest.mark.parametrize("scratch", [1, 40, 79, 120])
def test_reference_does_not_depend_on_its_blocks(make_case, assert_matches, monkeypatch, scratch):
    (q, k), options = make_case(2, 40, 12)
    expected = attention_importance_reference(q, k, threshold=1.3, **options)
    monkeypatch.setattr(module, "MAX_SCRATCH", scratch)
    assert_matches(attention_importance_reference(q, k, threshold=1.3, **options), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("h", "n", "dh"), SHAPES)
def test_kernel_matches_reference_for_every_shape(make_case, assert_matches, h, n, dh, reduction):
    (q, k), options = make_case(h, n, dh)
    options |= {"threshold": 1.3, "reduction": reduction}
    actual = attention_importance(q, k, backend="triton", **options)
    assert_matches(actual, attention_importance_reference(q, k, **options))


@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_scores_are_float32_for_every_dtype(make_case, assert_matches, backend, dtype, threshold):
    (q, k), options = make_case(2, 70, 24, dtype)
    options |= {"threshold": threshold}
    actual = attention_importance(q, k, backend=backend, **options)
    assert actual.dtype == torch.float32
    assert_matches(actual, attention_importance_reference(q.double(), k.double(), **options))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_a_key_patch_the_scores_are_the_column_means(make_case, assert_matches, backend):
    (q, k), options = make_case(2, 30, 8)
    for reduction in ("sum", "mean"):
        actual = attention_importance(
            q, k, threshold=31, reduction=reduction, backend=backend, **options
        )
        assert_matches(actual, _map(q, k, **options).mean(0))
        assert math.isclose(float(actual.sum()), 1, rel_tol=1e-5)


def test_kernel_reads_strided_views_and_nothing_around_them(make_case, assert_matches):
    (q, k), options = make_case(2, 40, 12)
    # as a tower gives them: heads side by side in the last dimension, a class token in front
    views = [
        torch.nn.functional.pad(x.transpose(0, 1).flatten(1), (0, 5, 1, 2), value=torch.nan)[
            1:41, :24
        ]
        .unflatten(1, (2, 12))
        .transpose(0, 1)
        for x in (q, k)
    ]
    assert not any(view.is_contiguous() for view in views)
    actual = attention_importance(*views, threshold=1.3, backend="triton", **options)
    assert_matches(actual, attention_importance_reference(q, k, threshold=1.3, **options))


def test_logits_too_large_for_exp_do_no_harm(make_case, assert_matches):
    (q, k), _ = make_case(2, 40, 12)
    for backend in ("torch", "triton"):
        actual = attention_importance(q * 200, k, threshold=1.3, scale=1.0, backend=backend)
        assert torch.isfinite(actual).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"reduction": "max"}, "reduction must be one of sum, mean", id="reduction"),
        pytest.param({"q": torch.ones(2, 3)}, "q must be 3-D", id="two-dimensions"),
        pytest.param({"q": torch.ones(1, 2, 3, dtype=torch.int64)}, "float dtype", id="integers"),
        pytest.param({"q": torch.ones(1, 0, 3)}, "at least one patch", id="no-patch"),
        pytest.param({"k": torch.ones(1, 3, 3)}, "k must have the shape", id="other-patches"),
        pytest.param({"k": torch.ones(1, 2, 3).half()}, "k must have the shape", id="dtype"),
        pytest.param({"backend": "numpy"}, "backend must be one of", id="backend"),
    ],
)
def test_bad_inputs_are_refused(change, message):
    good = {"q": torch.ones(1, 2, 3), "k": torch.ones(1, 2, 3), "threshold": 1.0, "scale": 1.0}
    arguments = good | change
    with pytest.raises(ValueError, match=message):
        attention_importance(arguments.pop("q"), arguments.pop("k"), **arguments)
