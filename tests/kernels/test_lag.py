"""LagKV's operators: the formula, the kernel beside its reference, ties, and moves in place."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from tokenprune.kernels import (
    lag_compact,
    lag_compact_reference,
    lag_keep,
    lag_keep_reference,
    lag_scores,
    lag_scores_reference,
)

SHAPES = [
    pytest.param(1, 4, 2, 0, 2, id="smallest"),
    pytest.param(1, 9, 1, 1, 4, id="one-channel"),
    pytest.param(3, 47, 7, 5, 13, id="primes"),
    pytest.param(2, 100, 16, 4, 32, id="rest-behind-the-last-partition"),
    pytest.param(2, 68, 16, 4, 32, id="one-partition-scored"),
    pytest.param(1, 1100, 33, 0, 513, id="one-past-a-tile-of-tokens"),
    pytest.param(1, 260, 257, 3, 65, id="one-past-a-row-tile"),
]


@pytest.fixture
def golden():
    return json.loads((Path(__file__).parents[1] / "golden" / "lagkv.json").read_text())


@pytest.fixture
def make_cache(generator, device):
    def make(h, n, d, dtype=torch.float32):
        cache = torch.randn(2, h, n, d, generator=generator)
        # offsets per channel, as keys have them
        cache += 3 * torch.randn(2, h, 1, d, generator=generator)
        return cache.to(dtype).to(device).unbind()

    return make


def _written_out(k, v, sink, lag):
    """The formula in plain Python floats, of one head."""

    def term(z):
        partitions = [z[i : i + lag] for i in range(sink, sink + (len(z) - sink) // lag * lag, lag)]
        rows = []
        for mine, next_one in itertools.pairwise(partitions):
            low = [min(c) for c in zip(*next_one, strict=True)]
            high = [max(c) for c in zip(*next_one, strict=True)]
            deviations = []
            for token in mine:
                x = [
                    (t - a) / (b - a)
                    for t, a, b in zip(token, low, high, strict=True)
                    if b - a > 1e-6 * max(abs(a), abs(b))
                ]
                mean = sum(x) / max(len(x), 1)
                deviations.append(math.sqrt(sum((y - mean) ** 2 for y in x) / max(len(x) - 1, 1)))
            top = max(deviations)
            weights = [math.exp(s - top) for s in deviations]
            rows.append([w / sum(weights) for w in weights])
        return rows

    pairs = zip(term(k), term(v), strict=True)
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in pairs]


@pytest.mark.parametrize(("h", "n", "d", "sink", "lag"), SHAPES)
def test_reference_follows_the_formula(make_cache, assert_matches, h, n, d, sink, lag):
    k, v = make_cache(h, n, d, torch.float64)
    expected = [_written_out(a.tolist(), b.tolist(), sink, lag) for a, b in zip(k, v, strict=True)]
    actual = lag_scores_reference(k, v, sink=sink, lag=lag)
    assert actual.shape == (h, (n - sink) // lag - 1, lag)
    assert_matches(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("h", "n", "d", "sink", "lag"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_matches_reference(make_cache, assert_matches, h, n, d, sink, lag, dtype):
    k, v = make_cache(h, n, d, dtype)
    actual = lag_scores(k, v, sink=sink, lag=lag, backend="triton")
    assert_matches(actual, lag_scores_reference(k, v, sink=sink, lag=lag), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_strided_cache_scores_like_a_dense_one(make_cache, backend):
    k, v = make_cache(2, 40, 12)
    wide = torch.stack([k, v], dim=-1).transpose(0, 1)
    strided = [wide[..., i].transpose(0, 1) for i in range(2)]
    assert not strided[0].is_contiguous()
    dense = lag_scores(k, v, sink=2, lag=8, backend=backend)
    assert torch.equal(dense, lag_scores(*strided, sink=2, lag=8, backend=backend))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("constant", [0.0, -7.25, 1e-30], ids=str)
def test_a_channel_constant_over_the_next_partition_is_left_out(
    make_cache, assert_matches, backend, constant
):
    k, v = make_cache(1, 16, 5)
    k[:, :, 3] = constant
    k[:, 2, 3] = 100.0
    scores = lag_scores(k, v, sink=0, lag=8, backend=backend)
    without = [0, 1, 2, 4]
    expected = lag_scores_reference(k[..., without], v[..., without], sink=0, lag=8)
    term_v = lag_scores_reference(v, v, sink=0, lag=8) / 2
    term_v_without = lag_scores_reference(v[..., without], v[..., without], sink=0, lag=8) / 2
    assert_matches(scores, expected - term_v_without + term_v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_constant_cache_scores_every_token_alike(device, backend):
    x = torch.ones(2, 24, 4, device=device)
    scores = lag_scores(x, x, sink=0, lag=8, backend=backend)
    torch.testing.assert_close(scores, torch.full((2, 2, 8), 2 / 8, device=device))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extreme_values_give_no_nan(device, generator, backend):
    x = torch.randn(1, 16, 8, generator=generator, dtype=torch.float32).to(device)
    x[:, 8:] *= 1e-30
    x[:, 3] = 1e30
    scores = lag_scores(x, x, sink=0, lag=8, backend=backend)
    assert scores.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("n", [0, 3, 4, 11])
def test_fewer_than_two_partitions_have_no_scores(device, backend, n):
    x = torch.zeros(2, n, 4, device=device)
    assert lag_scores(x, x, sink=4, lag=4, backend=backend).shape == (2, 0, 4)


def test_wrong_inputs_are_named():
    x = torch.zeros(1, 8, 4)
    with pytest.raises(ValueError, match=r"k must be 3-D .* got \[8, 4\]"):
        lag_scores(x[0], x, sink=0, lag=2)
    with pytest.raises(ValueError, match="v must be like k"):
        lag_scores(x, x.double(), sink=0, lag=2)
    with pytest.raises(ValueError, match="sink must be at least 0, got -1"):
        lag_scores(x, x, sink=-1, lag=2)
    with pytest.raises(ValueError, match="lag must be at least 1, got 0"):
        lag_scores(x, x, sink=0, lag=0)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 4\], got 5"):
        lag_keep(torch.zeros(1, 1, 4), 5)
    with pytest.raises(ValueError, match="scores must be 3-D"):
        lag_keep(torch.zeros(1, 4), 2)
    with pytest.raises(ValueError, match=r"source must be \[2 or 1, m\]"):
        lag_compact(torch.zeros(1, 2, 4, 4), torch.zeros(1), torch.zeros(3, 1), 0)
    with pytest.raises(ValueError, match=r"into must be 1-D and hold the destinations 0\.\.4"):
        lag_compact(
            torch.zeros(2, 1, 4, 4),
            torch.tensor([0, 1]),
            torch.arange(5)[None],
            0,
            into=torch.tensor([1]),
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("scores", "keep", "expected"),
    [
        pytest.param([3, 1, 2], 2, [0, 2], id="ascending"),
        pytest.param([1, 1, 1, 1], 2, [0, 1], id="ties-keep-the-lower-index"),
        pytest.param([0, 5, 5, 5, 9], 2, [1, 4], id="ties-at-the-edge"),
        pytest.param([2, 1], 2, [0, 1], id="all"),
        pytest.param([2, 1], 0, [], id="none"),
        pytest.param([-1, -2, -3], 1, [0], id="negative"),
    ],
)
def test_the_highest_scores_are_kept_in_order(device, backend, scores, keep, expected):
    scores = torch.tensor([[scores]], dtype=torch.float32, device=device)
    assert lag_keep(scores, keep, backend=backend).tolist() == [[expected]]


@pytest.mark.parametrize("lag", [1, 7, 64, 65, 130])
def test_keep_kernel_equals_reference(generator, device, lag):
    # few distinct values, so that ties are everywhere
    scores = torch.randint(0, 9, (1, 2, lag), generator=generator).float().to(device)
    for keep in {lag // 3, lag - 1} if lag > 64 else {1, lag // 3, lag - 1, lag} - {0}:
        found = lag_keep(scores, keep, backend="triton")
        assert torch.equal(found, lag_keep_reference(scores, keep)), keep


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("h", "block_size", "width", "begin", "m", "shared"),
    [
        pytest.param(2, 4, 6, 0, 9, False, id="from-the-start"),
        pytest.param(3, 5, 8, 7, 20, False, id="within-a-block"),
        pytest.param(2, 4, 130, 3, 300, False, id="several-tiles"),
        pytest.param(2, 4, 8, 2, 0, False, id="nothing"),
        pytest.param(2, 16, 8, 5, 40, True, id="one-row-for-all-heads"),
    ],
)
def test_rows_move_to_the_front_of_each_head(
    generator, device, monkeypatch, backend, h, block_size, width, begin, m, shared
):
    monkeypatch.setattr("tokenprune.kernels.ops.lag_compact.TILE", 7)
    n = begin + 3 * m + 5
    num_blocks = -(-n // block_size)
    cache = torch.randn(num_blocks + 3, h, block_size, width, generator=generator).to(device)
    blocks = torch.randperm(num_blocks + 3, generator=generator)[:num_blocks].int().to(device)
    source = torch.stack(
        [
            torch.randperm(n - begin, generator=generator)[:m].sort().values + begin
            for _ in range(1 if shared else h)
        ]
    ).to(device)
    before = cache.clone()
    rows = before[blocks.long()].transpose(0, 1).reshape(h, -1, width)
    expected = rows.clone()
    for head in range(h):
        expected[head, begin : begin + m] = rows[head, source[0 if shared else head]]
    lag_compact(cache, blocks, source, begin, backend=backend)
    assert torch.equal(cache[blocks.long()].transpose(0, 1).reshape(h, -1, width), expected)
    # no other request's block is touched
    others = [b for b in range(num_blocks + 3) if b not in blocks.tolist()]
    assert torch.equal(cache[others], before[others])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mixed", [False, True], ids=["all-blocks", "some-blocks"])
def test_rows_move_to_other_blocks_and_leave_the_old_ones(
    generator, device, monkeypatch, backend, mixed
):
    monkeypatch.setattr("tokenprune.kernels.ops.lag_compact.TILE", 7)
    h, size, width, begin, m, n = 2, 4, 70, 5, 150, 420
    cache = torch.randn(160, h, size, width, generator=generator).to(device)
    order = torch.randperm(160, generator=generator).int().to(device)
    blocks, into = order[: n // size], order[n // size :][: -(-(begin + m) // size)].clone()
    if mixed:
        # every third block stays in its place of the row
        into[::3] = blocks[: len(into)][::3]
    source = torch.stack(
        [torch.randperm(n - begin, generator=generator)[:m].sort().values + begin for _ in range(h)]
    ).to(device)
    before = cache.clone()
    lag_compact(cache, blocks, source, begin, into=into, backend=backend)
    rows = before[blocks.long()].transpose(0, 1).reshape(h, -1, width)
    found = cache[into.long()].transpose(0, 1).reshape(h, -1, width)
    for head in range(h):
        assert torch.equal(found[head, begin : begin + m], rows[head, source[head]])
    others = [b for b in range(160) if b not in into.tolist()]
    assert torch.equal(cache[others], before[others])


def test_the_default_on_a_cpu_is_the_reference():
    cache = torch.arange(24.0).view(3, 1, 4, 2)
    other = cache.clone()
    blocks, source = torch.tensor([2, 0]), torch.tensor([[1, 3, 6]])
    lag_compact(cache, blocks, source, 1)
    lag_compact_reference(other, blocks, source, 1)
    assert torch.equal(cache, other)


class TestGolden:
    """The worked example of the specification: 14 prompt tokens, 3 generated ones."""

    SINK, LAG, KEEP = 1, 4, 2

    @pytest.fixture(params=["reference-float64", "torch", "triton"])
    def scores(self, request, golden, device):
        float64 = request.param == "reference-float64"
        dtype = torch.float64 if float64 else torch.float32
        k, v = (torch.tensor([golden[f"lag.inputs.{n}"]], dtype=dtype).to(device) for n in "KV")
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if float64 else {"rtol": 1e-5, "atol": 1e-7}

        def run(rows):
            if float64:
                return lag_scores_reference(k[:, rows], v[:, rows], sink=0, lag=self.LAG)
            return lag_scores(k[:, rows], v[:, rows], sink=0, lag=self.LAG, backend=request.param)

        return run, tolerance

    def test_prompt(self, golden, scores, assert_matches):
        run, tolerance = scores
        found = run(list(range(self.SINK, 14)))
        assert_matches(found, [golden["lag.score"]], **tolerance)
        kept = lag_keep(found.float(), self.KEEP)[0] + torch.tensor([[1], [5]]).to(found.device)
        assert kept.flatten().tolist() == golden["lag.selected positions"]

    def test_decode(self, golden, scores, assert_matches):
        run, tolerance = scores
        cached = [*golden["lag.cache positions after prefill"], 14, 15, 16]
        done = golden["lag.compressed_len"]
        found = run(cached[done : done + 8])
        assert_matches(found, [golden["lag.decode score"]], **tolerance)
        kept = [cached[done + i] for i in lag_keep(found.float(), self.KEEP)[0, 0].tolist()]
        assert kept == golden["lag.decode selected"]
        after = [*cached[:done], *kept, *cached[done + 4 :]]
        assert after == golden["lag.cache positions after decode"]
