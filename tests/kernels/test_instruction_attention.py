import pytest
import torch

from tokenprune.kernels import instruction_attention, instruction_attention_reference
from tokenprune.kernels.ops import instruction_attention as module

SHAPES = [  # hq, hkv, t, n, dh
    pytest.param(1, 1, 1, 1, 2, id="one-of-each"),
    pytest.param(3, 1, 5, 37, 80, id="prime-sizes"),
    pytest.param(2, 2, 3, 64, 64, id="exactly-one-key-tile"),
    pytest.param(2, 2, 3, 65, 64, id="one-past-a-key-tile"),
    pytest.param(1, 1, 64, 70, 16, id="exactly-one-row-tile"),
    pytest.param(1, 1, 65, 70, 16, id="one-past-a-row-tile"),
    pytest.param(6, 2, 33, 80, 32, id="head-spans-two-row-tiles"),
    pytest.param(14, 2, 4, 90, 96, id="groups-of-7"),
    pytest.param(8, 1, 9, 71, 128, id="groups-of-8"),
    pytest.param(1, 1, 2, 1100, 8, id="more-splits-than-keys-need"),
    pytest.param(16, 16, 2, 66, 8, id="many-kv-heads"),
    pytest.param(2, 1, 3, 33, 256, id="wide-heads-and-short-tiles"),
]
Q_ROWS = {
    "tail": lambda t, n: torch.arange(n - t, n),
    "scattered": lambda t, n: torch.arange(t) * (n // t),
    "falling": lambda t, n: torch.arange(n - 1, n - 1 - t, -1),
}


@pytest.fixture
def make_case(generator, device, make_mask):
    def make(hq, hkv, t, n, dh, dtype=torch.float32, q_rows="tail", visual="mixed"):
        # keys twice as long as usual: a few weights stand out, as in a trained model
        q = torch.randn(hq, t, dh, generator=generator).to(dtype)
        k = torch.randn(hkv, n, dh, generator=generator).mul_(2).to(dtype)
        tensors = (q, k, Q_ROWS[q_rows](t, n), make_mask(visual, n))
        return [x.to(device) for x in tensors], {"scale": dh**-0.5}

    return make


def _written_out(q, k, q_rows, visual, scale):
    (hq, t, _), hkv = q.shape, k.shape[0]
    mass = torch.zeros(k.shape[1], dtype=torch.float64)
    q, k = q.double().cpu(), k.double().cpu()
    for head in range(hq):
        for i, row in enumerate(q_rows.tolist()):
            weights = torch.exp(scale * (k[head // (hq // hkv), : row + 1] @ q[head, i]))
            mass[: row + 1] += weights / weights.sum()
    return mass[visual.cpu()] / (hq * t)


@pytest.mark.parametrize("q_rows", Q_ROWS)
@pytest.mark.parametrize(("hq", "hkv"), [(1, 1), (6, 2)])
def test_reference_follows_the_formula(make_case, assert_matches, hq, hkv, q_rows):
    tensors, options = make_case(hq, hkv, 7, 40, 12, torch.float64, q_rows)
    actual = instruction_attention_reference(*tensors, **options)
    assert_matches(actual, _written_out(*tensors, **options), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scratch", [1, 40, 79, 120])
def test_reference_does_not_depend_on_its_blocks(make_case, assert_matches, monkeypatch, scratch):
    tensors, options = make_case(6, 2, 7, 40, 12)
    expected = instruction_attention_reference(*tensors, **options)
    monkeypatch.setattr(module, "MAX_SCRATCH", scratch)
    assert_matches(instruction_attention_reference(*tensors, **options), expected)


@pytest.mark.parametrize(("hq", "hkv", "t", "n", "dh"), SHAPES)
def test_kernel_matches_reference_for_every_shape(make_case, assert_matches, hq, hkv, t, n, dh):
    tensors, options = make_case(hq, hkv, t, n, dh)
    actual = instruction_attention(*tensors, backend="triton", **options)
    assert_matches(actual, instruction_attention_reference(*tensors, **options))


@pytest.mark.parametrize("q_rows", Q_ROWS)
@pytest.mark.parametrize("visual", ["mixed", "all", "one", "none"])
def test_kernel_matches_reference_for_every_mask(make_case, assert_matches, q_rows, visual):
    tensors, options = make_case(4, 2, 7, 130, 16, q_rows=q_rows, visual=visual)
    actual = instruction_attention(*tensors, backend="triton", **options)
    assert actual.shape == (int(tensors[3].sum()),)
    assert_matches(actual, instruction_attention_reference(*tensors, **options))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_scores_are_float32_for_every_dtype(make_case, assert_matches, backend, dtype):
    tensors, options = make_case(4, 2, 7, 70, 80, dtype)
    actual = instruction_attention(*tensors, backend=backend, **options)
    assert actual.dtype == torch.float32
    q, k, *masks = tensors
    exact = instruction_attention_reference(q.double(), k.double(), *masks, **options)
    assert_matches(actual, exact)


def _among_nan(x):
    return torch.nn.functional.pad(x, (0, 4, 0, 3), value=torch.nan)[:, :-3, :-4]


def test_kernel_reads_strided_views_and_nothing_around_them(make_case, assert_matches):
    (q, k, q_rows, visual), options = make_case(4, 2, 7, 70, 12)
    expected = instruction_attention_reference(q, k, q_rows, visual, **options)
    views = (
        _among_nan(q),
        _among_nan(k.transpose(1, 2)).transpose(1, 2),
        torch.stack((q_rows, q_rows), dim=1).int()[:, 0],
        torch.stack((visual, visual), dim=1)[:, 1],
    )
    assert not any(view.is_contiguous() for view in views)
    actual = instruction_attention(*views, backend="triton", **options)
    assert_matches(actual, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_past_the_last_key_sees_every_key(make_case, backend):
    (q, k, _, visual), options = make_case(4, 2, 3, 70, 16)
    last = torch.full((3,), 69, device=q.device)
    expected = instruction_attention(q, k, last, visual, backend=backend, **options)
    actual = instruction_attention(q, k, last + 500, visual, backend=backend, **options)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_of_visible_keys_add_up_to_one(make_case, assert_matches, backend):
    tensors, options = make_case(4, 2, 7, 70, 16, visual="all")
    scores = instruction_attention(*tensors, backend=backend, **options)
    assert_matches(scores.sum(), 1.0)
    tensors, options = make_case(4, 2, 7, 70, 16, visual="mixed")
    scores = instruction_attention(*tensors, backend=backend, **options)
    assert 0 < scores.sum() < 0.99


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_key_after_every_text_row_scores_zero(make_case, backend):
    (q, k, _, visual), options = make_case(4, 2, 3, 70, 16, visual="all")
    q_rows = torch.tensor([0, 40, 20], device=q.device)
    scores = instruction_attention(q, k, q_rows, visual, backend=backend, **options)
    assert (scores > 0).nonzero().squeeze(1).tolist() == list(range(41))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_keys_no_row_may_see_do_not_matter(make_case, backend):
    (q, k, _, visual), options = make_case(4, 2, 3, 70, 16)
    q_rows = torch.tensor([30, 40, 20], device=q.device)
    before = instruction_attention(q, k, q_rows, visual, backend=backend, **options)
    k[:, 41:] = 100
    after = instruction_attention(q, k, q_rows, visual, backend=backend, **options)
    assert torch.equal(before, after)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_large_logits_neither_overflow_nor_vanish(make_case, backend, sign):
    (q, k, q_rows, visual), _ = make_case(4, 2, 7, 70, 16, visual="all")
    q, k = q.abs(), k.abs() * sign
    scores = instruction_attention(q, k, q_rows, visual, scale=1e3, backend=backend)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.sum(), torch.ones_like(scores[0]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_permuting_visible_keys_permutes_scores(make_case, assert_matches, generator, backend):
    (q, k, q_rows, _), options = make_case(4, 2, 7, 70, 16)
    visual = torch.arange(70, device=q.device) < 60
    order = torch.randperm(60, generator=generator).to(q.device)
    before = instruction_attention(q, k, q_rows, visual, backend=backend, **options)
    shuffled = torch.cat((k[:, order], k[:, 60:]), dim=1)
    after = instruction_attention(q, shuffled, q_rows, visual, backend=backend, **options)
    assert_matches(after, before[order])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_permuting_text_rows_changes_nothing(make_case, assert_matches, generator, backend):
    (q, k, q_rows, visual), options = make_case(4, 2, 7, 70, 16)
    order = torch.randperm(7, generator=generator).to(q.device)
    before = instruction_attention(q, k, q_rows, visual, backend=backend, **options)
    after = instruction_attention(q[:, order], k, q_rows[order], visual, backend=backend, **options)
    assert_matches(after, before)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equal_inputs_give_equal_bits_and_are_left_alone(make_case, backend):
    tensors, options = make_case(4, 2, 7, 70, 16)
    before = [x.clone() for x in tensors]
    first = instruction_attention(*tensors, backend=backend, **options)
    assert torch.equal(first, instruction_attention(*tensors, backend=backend, **options))
    assert all(map(torch.equal, before, tensors))


Q, K = torch.ones(4, 3, 8), torch.ones(2, 9, 8)
R, V = torch.tensor([6, 7, 8]), torch.ones(9, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((Q[0], K, R, V), r"q must be 3-D .* got \[3, 8\]", id="2-D"),
        pytest.param((Q.int(), K, R, V), "q must be .* float dtype, got .*int32", id="integers"),
        pytest.param((Q[:, :0], K, R[:0], V), "q must have at least one text row", id="no-text"),
        pytest.param((Q, K[0], R, V), r"k must be 3-D .*, got \[9, 8\]", id="2-D-keys"),
        pytest.param((Q, K[..., :7], R, V), r"k must .* got \[2, 9, 7\]", id="other-head-dim"),
        pytest.param((Q, K.half(), R, V), "k must .* got .*float16", id="other-dtype"),
        pytest.param((Q, K.to("meta"), R, V), "k must .* got .* on meta", id="other-device"),
        pytest.param((Q[:3], K, R, V), "multiple of KV heads, got hq=3, hkv=2", id="uneven-heads"),
        pytest.param((Q, K[:0], R, V), "multiple of KV heads, got hq=4, hkv=0", id="no-kv-heads"),
        pytest.param((Q, K, R[:2], V), r"q_rows must .* \[3\], .* got \[2\]", id="short-rows"),
        pytest.param((Q, K, R.float(), V), "q_rows must .* got .*float32", id="float-rows"),
        pytest.param((Q, K, R.to("meta"), V), "q_rows must be on cpu", id="rows-elsewhere"),
        pytest.param((Q, K, R, V.int()), "visual must be a bool mask .*int32", id="int-mask"),
        pytest.param((Q, K, R, V[:8]), r"visual must .* \[9\], .* got \[8\]", id="short-mask"),
        pytest.param((Q, K, R, V.to("meta")), "visual must be on cpu", id="mask-elsewhere"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        instruction_attention(*arguments, scale=1.0)
