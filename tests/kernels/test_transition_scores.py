import math
import operator

import pytest
import torch

from tokenprune.kernels import transition_scores, transition_scores_reference, transition_terms

FORMS = [
    pytest.param({"signed": signed, "scope": scope}, id=f"{name}-{scope}")
    for signed, name in ((False, "absolute"), (True, "signed"))
    for scope in ("visual", "all")
]
SHAPES = [
    pytest.param(1, 8, id="one-row"),
    pytest.param(5, 1, id="one-channel"),
    pytest.param(13, 37, id="prime-sizes"),
    pytest.param(16, 16, id="exactly-one-row-tile"),
    pytest.param(17, 16, id="one-past-a-row-tile"),
    pytest.param(7, 257, id="fewer-rows-per-tile"),
    pytest.param(3, 4096, id="one-row-per-tile"),
    pytest.param(2, 8192, id="exactly-one-column-tile"),
    pytest.param(2, 8193, id="one-past-a-column-tile"),
    pytest.param(500, 5, id="two-tiles-of-scores"),
    pytest.param(257, 2049, id="one-past-a-tile-of-partial-sums"),
]


@pytest.fixture
def make_pair(generator, device):
    def make(n, d, dtype=torch.float32):
        pair = torch.randn(2, n, d, generator=generator)
        # half of the outputs point along their inputs, so that cosines of all sizes occur
        pair[1, ::2] += 2 * pair[0, ::2]
        # a large last channel, so that losing it shows
        pair[0, :, -1] *= d**0.5
        return pair.to(dtype).to(device).unbind()

    return make


def _written_out(x_in, x_out, visual, signed, scope):
    x_in, x_out, visual = x_in.double().tolist(), x_out.double().tolist(), visual.tolist()
    terms, scores = [], []
    for a, b in zip(x_in, x_out, strict=True):
        cosine = sum(map(operator.mul, a, b)) / (math.hypot(*a) * math.hypot(*b))
        terms.append(math.exp(1 - (cosine if signed else abs(cosine))))
    total = sum(term for term, v in zip(terms, visual, strict=True) if v or scope == "all")
    for a, b, term, v in zip(x_in, x_out, terms, visual, strict=True):
        if v:
            scores.append(math.hypot(*b) / math.hypot(*a) * term / total)
    return scores


@pytest.mark.parametrize("form", FORMS)
def test_reference_follows_the_formula(make_pair, make_mask, assert_matches, device, form):
    x_in, x_out = make_pair(23, 11, torch.float64)
    visual = make_mask("mixed", 23).to(device)
    expected = _written_out(x_in, x_out, visual, **form)
    actual = transition_scores_reference(x_in, x_out, visual, **form)
    assert_matches(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_kernel_matches_reference_for_every_shape(make_pair, make_mask, assert_matches, n, d):
    x_in, x_out = make_pair(n, d)
    visual = make_mask("mixed", n).to(x_in.device)
    for scope in ("visual", "all"):
        actual = transition_scores(x_in, x_out, visual, scope=scope, backend="triton")
        assert_matches(actual, transition_scores_reference(x_in, x_out, visual, scope=scope))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["mixed", "all", "one", "none"])
def test_kernel_matches_reference_for_every_form(make_pair, make_mask, assert_matches, form, kind):
    x_in, x_out = make_pair(19, 33)
    visual = make_mask(kind, 19).to(x_in.device)
    actual = transition_scores(x_in, x_out, visual, backend="triton", **form)
    assert actual.shape == (int(visual.sum()),)
    assert_matches(actual, transition_scores_reference(x_in, x_out, visual, **form))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_scores_are_float32_for_every_dtype(make_pair, make_mask, assert_matches, backend, dtype):
    x_in, x_out = make_pair(19, 300, dtype)
    visual = make_mask("mixed", 19).to(x_in.device)
    actual = transition_scores(x_in, x_out, visual, backend=backend)
    assert actual.dtype == torch.float32
    expected = transition_scores_reference(x_in.double(), x_out.double(), visual)
    assert_matches(actual, expected)


def test_kernel_reads_strided_views_of_two_dtypes(make_pair, make_mask, assert_matches):
    wide, tall = make_pair(40, 40)
    x_in, x_out = wide.T[3:16, 1:30], tall.half()[4:30:2, 1:30]
    visual = make_mask("mixed", 26).to(x_in.device)[::2]
    actual = transition_scores(x_in, x_out, visual, backend="triton")
    expected = transition_scores_reference(x_in.contiguous(), x_out.contiguous(), visual.clone())
    assert_matches(actual, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_a_zero_input_row_scores_zero_and_spoils_nothing(make_pair, make_mask, backend, form):
    x_in, x_out = make_pair(9, 12)
    x_in[3] = 0
    x_out[5] = 0
    visual = make_mask("all", 9).to(x_in.device)
    scores = transition_scores(x_in, x_out, visual, backend=backend, **form)
    assert scores.isfinite().all()
    assert (scores == 0).nonzero().squeeze(1).tolist() == [3, 5]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float16_extremes_do_not_overflow(device, backend):
    x = torch.full((4, 512), 60000.0, dtype=torch.float16, device=device)
    x_out = x * torch.tensor([1, -1, 1, -1], device=device)[:, None]
    visual = torch.ones(4, dtype=torch.bool, device=device)
    scores = transition_scores(x, x_out.half(), visual, signed=True, backend=backend)
    ratio = math.exp(2)
    torch.testing.assert_close(scores[1] / scores[0], torch.tensor(ratio, device=device))
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0, device=device))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_over_magnitudes_are_a_softmax(make_pair, make_mask, assert_matches, backend):
    x_in, x_out = make_pair(21, 30)
    visual = make_mask("mixed", 21).to(x_in.device)
    magnitude = (x_out.norm(dim=1) / x_in.norm(dim=1))[visual]
    scores = transition_scores(x_in, x_out, visual, backend=backend)
    assert_matches((scores / magnitude).sum(), 1.0)
    scores = transition_scores(x_in, x_out, visual, scope="all", backend=backend)
    assert (scores / magnitude).sum() < 0.9


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_text_rows_matter_only_in_the_scope_of_all_rows(make_pair, make_mask, backend):
    x_in, x_out = make_pair(21, 30)
    visual = make_mask("mixed", 21).to(x_in.device)
    changed = x_out.clone()
    changed[~visual] = x_in[~visual]

    def scores(out, scope):
        return transition_scores(x_in, out, visual, scope=scope, backend=backend)

    assert torch.equal(scores(x_out, "visual"), scores(changed, "visual"))
    assert not torch.allclose(scores(x_out, "all"), scores(changed, "all"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_the_signed_form_sees_the_sign(make_pair, make_mask, backend):
    x_in, x_out = make_pair(21, 30)
    visual = make_mask("all", 21).to(x_in.device)
    flip = torch.where(torch.arange(21, device=x_in.device) % 3 == 0, -1.0, 1.0)[:, None]

    def scores(out, signed):
        return transition_scores(x_in, out, visual, signed=signed, backend=backend)

    assert torch.equal(scores(x_out, False), scores(x_out * flip, False))
    assert not torch.allclose(scores(x_out, True), scores(x_out * flip, True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_permuting_rows_permutes_scores(make_pair, make_mask, assert_matches, generator, backend):
    x_in, x_out = make_pair(21, 30)
    visual = make_mask("all", 21).to(x_in.device)
    order = torch.randperm(21, generator=generator).to(x_in.device)
    before = transition_scores(x_in, x_out, visual, backend=backend)
    after = transition_scores(x_in[order], x_out[order], visual, backend=backend)
    assert_matches(after, before[order])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inputs_are_left_alone(make_pair, make_mask, backend):
    x_in, x_out = make_pair(9, 12)
    visual = make_mask("mixed", 9).to(x_in.device)
    before = [x.clone() for x in (x_in, x_out, visual)]
    transition_scores(x_in, x_out, visual, backend=backend)
    assert all(map(torch.equal, before, (x_in, x_out, visual)))


X, V = torch.ones(7, 4), torch.ones(7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        pytest.param((X[0], X[0], V), {}, r"x_in must be 2-D .*, got \[4\]", id="1-D"),
        pytest.param((X.int(), X, V), {}, "x_in must be .* got .*int32", id="integers"),
        pytest.param((X, X[:, :3], V), {}, r"x_out must .*, got \[7, 3\]", id="other-shape"),
        pytest.param((X, X.int(), V), {}, "x_out must be float .*int32", id="output-integers"),
        pytest.param((X, X.to("meta"), V), {}, "x_out must .* got .* on meta", id="other-device"),
        pytest.param((X, X, V.int()), {}, "visual must be a bool mask .*int32", id="int-mask"),
        pytest.param((X, X, V[:6]), {}, r"visual must .* \[7\], .*got \[6\]", id="short-mask"),
        pytest.param((X, X, V.to("meta")), {}, "visual must be on cpu", id="mask-elsewhere"),
        pytest.param((X, X, V), {"scope": "image"}, "scope must be .* got 'image'", id="scope"),
        pytest.param((X, X, V), {"backend": "cuda"}, "backend must .* got 'cuda'", id="backend"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        transition_scores(*arguments, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [1, 7, 40])
def test_terms_of_any_parts_make_the_scores_of_all_rows(
    make_pair, make_mask, assert_matches, backend, form, part
):
    x_in, x_out = make_pair(40, 30)
    visual = make_mask("mixed", 40).to(x_in.device)
    parts = [
        transition_terms(*rows, backend=backend, **form)
        for rows in zip(x_in.split(part), x_out.split(part), visual.split(part), strict=True)
    ]
    weighted, totals = zip(*parts, strict=True)
    expected = transition_scores(x_in, x_out, visual, backend=backend, **form)
    assert_matches(torch.cat(weighted) / sum(totals), expected)
