"""channel_scores: the formula, the kernel beside its reference, and kvpress's scores."""

import types

import pytest
import torch

from tokenprune.kernels import channel_scores, channel_scores_reference

SHAPES = [
    pytest.param(1, 1, 1, 1, 1, id="smallest"),
    pytest.param(3, 1, 7, 13, 5, id="primes"),
    pytest.param(2, 4, 32, 100, 16, id="groups-of-four"),
    pytest.param(1, 2, 32, 1025, 64, id="one-past-a-run"),
    pytest.param(1, 1, 3, 70, 96, id="channels-no-power-of-two"),
    pytest.param(1, 1, 3, 70, 257, id="one-past-a-row-tile"),
]


@pytest.fixture
def make(generator, device):
    def make(h, group, w, n, d, dtype=torch.float32):
        q = torch.randn(h * group, w, d, generator=generator)
        k = torch.randn(h, n, d, generator=generator) + 3 * torch.randn(
            h, 1, d, generator=generator
        )
        return q.to(dtype).to(device), k.to(dtype).to(device)

    return make


def test_the_score_is_the_channels_share_of_the_products(make):
    # the definition, with the n x w products written out
    q, k = make(2, 3, 4, 6, 5, torch.float64)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for head in range(2):
        for j in range(5):
            for g in range(3):
                share = q[3 * head + g, :, j][:, None] * k[head, :, j]
                expected[head, j] += share.norm() ** 2 / (3 * 4 * 6)
    torch.testing.assert_close(channel_scores_reference(q, k), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("h", "group", "w", "n", "d"), SHAPES)
def test_the_kernel_equals_the_reference(make, assert_matches, dtype, h, group, w, n, d):
    q, k = make(h, group, w, n, d, dtype)
    found = channel_scores(q, k, backend="triton")
    assert found.dtype == torch.float32
    assert_matches(found, channel_scores_reference(q, k))


def test_any_strides_will_do(make, assert_matches):
    q, k = make(2, 2, 8, 40, 16)
    expected = channel_scores_reference(q, k)
    rows = k.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([k, k], dim=-1)[..., 0]
    for strided in (rows, wide):
        assert_matches(channel_scores(q, strided, backend="triton"), expected)
        assert_matches(channel_scores(q, strided, backend="torch"), expected)


def test_runs_of_keys_average_by_length(make, assert_matches):
    q, k = make(2, 2, 8, 40, 16)
    parts = [channel_scores(q, k[:, a:b]) * (b - a) for a, b in ((0, 7), (7, 40))]
    assert_matches(sum(parts) / 40, channel_scores(q, k))


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        pytest.param((2, 3, 4), (2, 3), "k must be 3-D", id="k-flat"),
        pytest.param((2, 3, 4), (2, 0, 4), "k must be 3-D", id="no-keys"),
        pytest.param((3, 3, 4), (2, 3, 4), "multiple of 2", id="no-group"),
        pytest.param((2, 3, 5), (2, 3, 4), r"\[hq, w, 4\]", id="other-channels"),
        pytest.param((2, 0, 4), (2, 3, 4), "q must be 3-D", id="no-queries"),
    ],
)
def test_wrong_shapes_are_refused(device, q, k, message):
    with pytest.raises(ValueError, match=message):
        channel_scores(torch.ones(q, device=device), torch.ones(k, device=device))


def test_wrong_dtypes_are_refused(make):
    q, k = make(1, 1, 2, 2, 4)
    with pytest.raises(ValueError, match="dtype and device of k"):
        channel_scores(q.half(), k)
    with pytest.raises(ValueError, match="float dtype"):
        channel_scores(q, k.long())


@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.6])
def test_kvpress_drops_the_channels_that_score_lowest_here(kvpress, make, monkeypatch, ratio):
    q, k = (x.cpu() for x in make(2, 4, 32, 100, 16))
    press = kvpress("presses.think_press").ThinKPress(
        key_channel_compression_ratio=ratio, window_size=32
    )
    # the press projects and rotates the window's queries itself; the score is behind that
    monkeypatch.setattr(press, "compute_window_queries", lambda *_: q[None])
    module = types.SimpleNamespace(
        config=types.SimpleNamespace(num_attention_heads=8, num_key_value_heads=2), head_dim=16
    )
    inputs = {"hidden_states": None, "position_embeddings": None}
    zeroed, _ = press.compress(module, None, k[None].clone(), k[None], None, inputs)
    for head, score in enumerate(channel_scores(q, k)):
        theirs = (zeroed[0, head] == 0).all(0).nonzero()[:, 0].tolist()
        assert len(theirs) == int(16 * ratio)
        assert sorted(score.argsort()[: len(theirs)].tolist()) == theirs
