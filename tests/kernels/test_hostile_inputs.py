"""Every operator under NaN, infinities, ties, and one or no element: defined, alike, in bounds.

The Triton form allocates and writes inside guarded buffers here: a store that the data moved out
of its buffer shows in the guard.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from tokenprune import kernels
from tokenprune.kernels import (
    lag_compact,
    lag_keep,
    lag_scores,
    packed_decode_attention,
    places_of,
    recycle,
)

# the interpreter computes with numpy, which warns of what these inputs are made for
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPERATORS = [name for name in kernels.__all__ if f"{name}_reference" in kernels.__all__]
GUARD, SENTINEL = 256, 77


def spoil_two(value):
    def spoil(x):
        x.view(-1)[x.numel() // 4] = x.view(-1)[x.numel() // 2] = value

    return spoil


def spoil_some(*values):
    def spoil(x):
        for i, value in enumerate(values):
            x.view(-1)[i :: 2 * len(values) + 1] = value

    return spoil


SPOILS = {
    "two-nan": spoil_two(math.nan),
    "two-inf": spoil_two(math.inf),
    "two-minus-inf": spoil_two(-math.inf),
    "some-of-each": spoil_some(math.nan, math.inf, -math.inf),
    "all-nan": lambda x: x.fill_(math.nan),
    "all-inf": lambda x: x.fill_(math.inf),
    "all-minus-inf": lambda x: x.fill_(-math.inf),
    "all-equal": lambda x: x.fill_(0.25),
    "all-zero": lambda x: x.zero_(),
}


def is_within(scores, low, high):
    return bool(((scores >= low) & (scores <= high)).all())


def is_ascending(kept, end):
    in_range = (kept >= 0) & (kept < end)
    return bool(in_range.all()) and bool((kept.diff(dim=-1) > 0).all())


@dataclass(frozen=True)
class Case:
    """One operator on one size.

    Attributes:
        make: Builds the tensors by name from a `randn`.
        options: What else it is called with.
        spoilt: The tensors that get hostile values.
        written: The tensors that it writes to.
        is_legal: Whether a result is one that its readers can live with.
    """

    make: Callable
    options: dict = field(default_factory=dict)
    spoilt: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    is_legal: Callable = lambda result: True


def rows_of(n, d):
    visual = torch.arange(n) % 3 > 0 if n > 1 else torch.ones(n, dtype=torch.bool)
    return lambda randn: {"x_in": randn(n, d), "x_out": randn(n, d), "visual": visual}


def text_and_keys(hq, hkv, t, n, d):
    def make(randn):
        rows = torch.arange(n - t, n)
        # the first text row sees no key at all
        rows[:1] = rows[:1] if t == 1 else -1
        visual = torch.arange(n) % 2 == 0
        return {"q": randn(hq, t, d), "k": randn(hkv, n, d), "q_rows": rows, "visual": visual}

    return make


def paged(heads, group, d, block_size, width, tables, rows):
    def make(randn):
        kept = torch.stack([torch.arange(2 * d)[-width:] for _ in range(heads)])
        tokens = len(rows) + 2
        return {
            "query": randn(tokens, heads * group, d),
            "cache": randn(1 + max(map(max, tables)), heads, block_size, 2 * d),
            "blocks": torch.tensor(tables, dtype=torch.int32),
            "rows": torch.tensor(rows, dtype=torch.int32).view(-1, kernels.ROW_FIELDS),
            "places": places_of(kept, 2 * d).expand(len(tables), -1, -1).contiguous(),
            "out": randn(tokens, heads * group, d),
        }

    return make


def moved(h, blocks, block_size, width, m):
    def make(randn):
        source = 2 + torch.arange(m)[None] + torch.arange(h)[:, None]
        cache, table = randn(blocks, h, block_size, width), torch.arange(blocks).flip(0)
        return {"cache": cache, "blocks": table, "source": source, "begin": 1}

    return make


def tokens_of(n, d):
    return lambda randn: {"features": randn(n, d), "importance": randn(n)}


CASES = {
    "attention_importance": {
        # 70 patches are two tiles
        "usual": Case(
            lambda randn: {"q": randn(2, 70, 8), "k": randn(2, 70, 8)},
            {"threshold": 1.1, "scale": 0.5},
            ("q", "k"),
            is_legal=lambda scores: is_within(scores, 0, 70),
        ),
        "one": Case(
            lambda randn: {"q": randn(1, 1, 1), "k": randn(1, 1, 1)},
            {"threshold": 0.5, "scale": 1.0, "reduction": "mean"},
            ("q", "k"),
            is_legal=lambda scores: is_within(scores, 0, 1),
        ),
    },
    "channel_scores": {
        "usual": Case(
            lambda randn: {"q": randn(4, 5, 12), "k": randn(2, 40, 12)},
            spoilt=("q", "k"),
            is_legal=lambda scores: bool(((scores >= 0) | scores.isnan()).all()),
        ),
        "one": Case(lambda randn: {"q": randn(1, 1, 1), "k": randn(1, 1, 1)}, spoilt=("q", "k")),
    },
    "instruction_attention": {
        "usual": Case(
            text_and_keys(4, 2, 5, 70, 8),
            {"scale": 0.4},
            ("q", "k"),
            is_legal=lambda scores: is_within(scores, 0, 1) and scores.sum() < 1 + 1e-5,
        ),
        "one": Case(
            text_and_keys(1, 1, 1, 1, 1),
            {"scale": 1.0},
            ("q", "k"),
            is_legal=lambda scores: is_within(scores, 0, 1),
        ),
        "empty": Case(
            lambda randn: text_and_keys(2, 1, 1, 0, 4)(randn) | {"q_rows": torch.tensor([-1])},
            {"scale": 1.0},
        ),
    },
    "lag_compact": {
        "usual": Case(moved(2, 5, 8, 6, 20), spoilt=("cache",), written=("cache",)),
        "one": Case(
            lambda randn: moved(1, 1, 4, 1, 1)(randn), spoilt=("cache",), written=("cache",)
        ),
        "empty": Case(moved(2, 2, 4, 3, 0), written=("cache",)),
    },
    "lag_keep": {
        "usual": Case(
            lambda randn: {"scores": randn(2, 3, 70)},
            {"keep": 33},
            ("scores",),
            is_legal=lambda kept: is_ascending(kept, 70),
        ),
        "one": Case(
            lambda randn: {"scores": randn(1, 1, 1)},
            {"keep": 1},
            ("scores",),
            is_legal=lambda kept: kept.tolist() == [[[0]]],
        ),
        "empty": Case(lambda randn: {"scores": randn(2, 3, 0)}, {"keep": 0}),
        "no-partition": Case(lambda randn: {"scores": randn(2, 0, 4)}, {"keep": 2}),
    },
    "lag_scores": {
        "usual": Case(
            lambda randn: {"k": randn(2, 44, 6) + 3, "v": randn(2, 44, 6)},
            {"sink": 3, "lag": 10},
            ("k", "v"),
            is_legal=lambda scores: is_within(scores, 0, 2),
        ),
        "one": Case(
            lambda randn: {"k": randn(1, 2, 1), "v": randn(1, 2, 1)},
            {"sink": 0, "lag": 1},
            ("k", "v"),
            is_legal=lambda scores: is_within(scores, 0, 2),
        ),
        "empty": Case(
            lambda randn: {"k": randn(2, 0, 4), "v": randn(2, 0, 4)}, {"sink": 0, "lag": 4}
        ),
        "no-channel": Case(
            lambda randn: {"k": randn(1, 9, 0), "v": randn(1, 9, 0)}, {"sink": 0, "lag": 4}
        ),
    },
    "packed_decode_attention": {
        "usual": Case(
            paged(2, 2, 8, 4, 10, [[0, 1, 2], [3, 4, 5]], [[0, 0, 1, 8, 10], [2, 1, 0, 12, 10]]),
            {"scale": 0.3},
            ("query", "cache"),
            ("out",),
        ),
        "one": Case(
            paged(1, 1, 1, 1, 2, [[0]], [[0, 0, 0, 1, 2]]),
            {"scale": 1.0},
            ("query", "cache"),
            ("out",),
        ),
        "empty": Case(paged(1, 2, 4, 4, 6, [[0]], []), {"scale": 1.0}, written=("out",)),
        "no-key": Case(
            paged(1, 2, 4, 4, 6, [[0]], [[1, 0, 0, 0, 6]]),
            {"scale": 1.0},
            written=("out",),
            is_legal=lambda out: not out[1].any(),
        ),
        "no-row-of-the-query": Case(
            paged(1, 2, 4, 4, 6, [[0]], [[9, 0, 1, 2, 6], [-1, 0, 1, 2, 6]]),
            {"scale": 1.0},
            written=("out",),
        ),
    },
    "patch_entropy": {
        "usual": Case(
            lambda randn: {"image": (randn(3, 15, 20) * 60).abs().clamp(max=255).byte()},
            {"patch": 7},
            is_legal=lambda bits: is_within(bits, 0, math.log2(49) + 1e-5),
        ),
        **{
            f"one-colour-patch-{patch}": Case(
                lambda randn: {"image": torch.full((3, 14, 14), 9, dtype=torch.uint8)},
                {"patch": patch},
                is_legal=lambda bits: is_within(bits, 0, 1e-6),
            )
            for patch in (1, 2, 3, 5, 7, 13)
        },
        "one": Case(
            lambda randn: {"image": torch.full((3, 1, 1), 255, dtype=torch.uint8)},
            {"patch": 1},
            is_legal=lambda bits: bits.tolist() == [0.0],
        ),
    },
    "recycle": {
        "usual": Case(
            tokens_of(42, 5),
            {"grid_width": 7, "keep": 12, "cell": 2.5},
            ("features", "importance"),
            is_legal=lambda result: is_ascending(result[0], 42),
        ),
        "fewer-rows-than-cells": Case(
            tokens_of(42, 5),
            {"grid_width": 7, "keep": 3, "cell": 1e-9},
            ("features", "importance"),
            is_legal=lambda result: is_ascending(result[0], 42),
        ),
        "one": Case(
            tokens_of(1, 1),
            {"grid_width": 1, "keep": 1, "cell": 1.0},
            ("features", "importance"),
            is_legal=lambda result: result[0].tolist() == [0],
        ),
    },
    "transition_scores": {
        "usual": Case(
            rows_of(37, 12),
            spoilt=("x_in", "x_out"),
            is_legal=lambda scores: is_within(scores, 0, 1e6),
        ),
        "all-rows": Case(
            rows_of(37, 12),
            {"scope": "all", "signed": True},
            ("x_in", "x_out"),
            is_legal=lambda scores: is_within(scores, 0, 1e6),
        ),
        "one": Case(
            rows_of(1, 1),
            spoilt=("x_in", "x_out"),
            is_legal=lambda scores: is_within(scores, 0, 1e6),
        ),
        "empty": Case(rows_of(0, 4)),
    },
    "transition_terms": {
        "usual": Case(
            rows_of(37, 12),
            spoilt=("x_in", "x_out"),
            is_legal=lambda terms: all(is_within(x, 0, 1e6) for x in terms),
        ),
        "all-rows": Case(
            rows_of(37, 12),
            {"scope": "all", "signed": True},
            ("x_in", "x_out"),
            is_legal=lambda terms: all(is_within(x, 0, 1e6) for x in terms),
        ),
        "one": Case(
            rows_of(1, 1),
            spoilt=("x_in", "x_out"),
            is_legal=lambda terms: all(is_within(x, 0, 1e6) for x in terms),
        ),
        "empty": Case(rows_of(0, 4)),
    },
}
EVERY = [(op, size) for op, sizes in CASES.items() for size in sizes]
SPOILT = [
    pytest.param(op, size, name, spoil, id=f"{op}-{size}-{name}-{spoil}")
    for op, size in EVERY
    for name in CASES[op][size].spoilt
    for spoil in SPOILS
]


class Guards:
    """Buffers in the middle of larger ones that nobody may write to."""

    def __init__(self):
        self.buffers = []

    def around(self, tensor):
        """Return an equal dense tensor with a guard before and after it."""
        buffer = torch.full(
            (tensor.numel() + 2 * GUARD,), SENTINEL, dtype=tensor.dtype, device=tensor.device
        )
        inside = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        self.buffers.append(buffer)
        return inside

    def empty(self, *shape, dtype=None, device=None):
        """Stand in for `torch.empty`; what is not written stays NaN, or a large number."""
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        poison = math.nan if dtype is None or dtype.is_floating_point else 1 << 30
        return self.around(torch.full(shape, poison, dtype=dtype, device=device))

    @property
    def are_whole(self):
        return all(
            bool((part == SENTINEL).all())
            for buffer in self.buffers
            for part in (buffer[:GUARD], buffer[len(buffer) - GUARD :])
        )


@pytest.fixture
def guards(monkeypatch):
    made = Guards()
    monkeypatch.setattr(torch, "empty", made.empty)
    return made


@pytest.fixture
def run(device, guards):
    """Run an operator, its outputs and what it writes to guarded; return all that it wrote."""

    def run(op, case, tensors, backend):
        arguments = {
            name: x.to(device, copy=True) if isinstance(x, torch.Tensor) else x
            for name, x in tensors.items()
        }
        arguments |= {name: guards.around(arguments[name]) for name in case.written}
        result = getattr(kernels, op)(**arguments, **case.options, backend=backend)
        assert guards.are_whole, "written outside of a buffer"
        return arguments[case.written[0]] if case.written else result

    return run


@pytest.fixture
def make(generator):
    def make(case, name=None, spoil=None):
        tensors = case.make(lambda *shape: torch.randn(shape, generator=generator))
        if name is not None:
            SPOILS[spoil](tensors[name])
        return tensors

    return make


def assert_alike(actual, expected):
    if isinstance(expected, tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_alike(one, other)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_every_operator_is_among_the_cases():
    assert set(CASES) == set(OPERATORS)


@pytest.mark.parametrize(("op", "size", "name", "spoil"), SPOILT)
def test_undefined_values_have_a_defined_result_that_both_backends_share(
    make, run, op, size, name, spoil
):
    case = CASES[op][size]
    tensors = make(case, name, spoil)
    results = [run(op, case, tensors, backend) for backend in ("torch", "triton")]
    assert_alike(*results)
    assert all(case.is_legal(result) for result in results)


@pytest.mark.parametrize(("op", "size"), EVERY)
def test_few_elements_and_none_are_no_special_case(make, run, op, size):
    case = CASES[op][size]
    tensors = make(case)
    results = [run(op, case, tensors, backend) for backend in ("torch", "triton")]
    assert_alike(*results)
    assert all(case.is_legal(result) for result in results)


def test_a_guard_sees_what_is_written_outside(guards):
    inside = guards.around(torch.zeros(3))
    assert guards.are_whole
    guards.buffers[0][GUARD + inside.numel()] = 0
    assert not guards.are_whole


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("scores", "keep", "expected"),
    [
        ([math.nan, -math.inf, math.nan, 1.0], 1, [3]),
        ([math.nan, -math.inf, math.nan, 1.0], 2, [1, 3]),
        ([math.nan, -math.inf, math.nan, 1.0], 3, [0, 1, 3]),
        ([math.inf, math.nan, math.inf, -0.0, 0.0], 3, [0, 2, 3]),
        ([math.nan] * 5, 2, [0, 1]),
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["nan", "minus-nan"])
def test_nan_ranks_after_minus_infinity_and_ties_keep_the_lower_index(
    device, guards, backend, scores, keep, expected, sign
):
    x = torch.tensor([[scores]])
    x = torch.where(x.isnan(), x * sign, x).to(device)
    assert lag_keep(x, keep, backend=backend).tolist() == [[expected]]
    assert guards.are_whole


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_key_reaches_its_own_partition_and_the_one_before(generator, device, backend):
    k, v = torch.randn(2, 2, 50, 6, generator=generator).to(device).unbind()
    expected = lag_scores(k, v, sink=0, lag=10, backend=backend)
    k[1, 25, 3] = math.nan
    scores = lag_scores(k, v, sink=0, lag=10, backend=backend)
    differs = (scores != expected).any(-1)
    assert differs.tolist() == [[False] * 4, [False, True, True, False]]
    # its term of the keys is gone, that of the values is left
    assert scores[1, 2, 5] < expected[1, 2, 5]
    others = torch.arange(10, device=device) != 5
    share = lag_scores(k, k, sink=0, lag=10, backend=backend)[1, 2] / 2
    assert share[5] == 0
    torch.testing.assert_close(share[others].sum().item(), 1.0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_span_beyond_all_numbers_leaves_its_channel_out(generator, device, backend):
    x = torch.randn(1, 20, 3, generator=generator).to(device)
    expected = lag_scores(x[..., :2], x[..., :2], sink=0, lag=10, backend=backend)
    x[0, ::2, 2], x[0, 1::2, 2] = 3e38, -3e38
    scores = lag_scores(x, x, sink=0, lag=10, backend=backend)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_channel_with_nan_is_the_first_to_go(generator, device, backend):
    q, k = torch.randn(4, 5, 8, generator=generator), torch.randn(2, 30, 8, generator=generator)
    k[0, 7, 2] = math.nan
    scores = kernels.channel_scores(q.to(device), k.to(device), backend=backend)
    assert scores.isnan().nonzero().tolist() == [[0, 2]]
    kept = lag_keep(scores[:, None], 7, backend=backend)[0, 0].tolist()
    assert kept == [0, 1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_undefined_text_row_leaves_the_others_their_scores(make, run, backend):
    case = CASES["instruction_attention"]["usual"]
    tensors = make(case)
    whole = run("instruction_attention", case, tensors, backend)
    tensors["q"][:, 3] = math.nan
    scores = run("instruction_attention", case, tensors, backend)
    rest = {
        **tensors,
        "q": tensors["q"][:, [0, 1, 2, 4]],
        "q_rows": tensors["q_rows"][[0, 1, 2, 4]],
    }
    expected = run("instruction_attention", case, rest, backend) * 4 / 5
    torch.testing.assert_close(scores, expected)
    assert (scores <= whole + 1e-6).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", ["attention_importance", "packed_decode_attention"])
def test_a_tile_of_minus_infinity_hides_its_own_keys_only(make, run, device, backend, op):
    if op == "attention_importance":
        case = CASES[op]["usual"]
        tensors = make(case)
        tensors["q"].abs_()
        tensors["k"][:, :64] = -math.inf
        scores = run(op, case, tensors, backend)
        assert not scores[:64].any()
        assert scores[64:].sum() > 0.5
    else:
        # the first of two tiles of 32 tokens
        case = Case(
            paged(1, 1, 4, 32, 8, [[0, 1]], [[0, 0, 0, 40, 8]]), {"scale": 0.5}, written=("out",)
        )
        tensors = make(case)
        tensors["query"].abs_()
        tensors["cache"][0, ..., :4] = -math.inf
        out = run(op, case, tensors, backend)[0, 0]
        keys, values = tensors["cache"][1, 0, :8].to(device).chunk(2, dim=1)
        probs = (tensors["query"][0, 0].to(device) @ keys.T * 0.5).softmax(-1)
        torch.testing.assert_close(out, probs @ values)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_query_head_spoils_its_own_row_only(make, device, backend, splits):
    tensors = make(CASES["packed_decode_attention"]["usual"])
    tensors["query"][2, 1] = math.nan
    tensors = {name: x.to(device) for name, x in tensors.items()}
    out = packed_decode_attention(**tensors, scale=0.3, splits=splits, backend=backend)
    assert out.isnan().all(-1).nonzero().tolist() == [[2, 1]]
    assert int(out.isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_that_is_not_finite_scores_zero_and_the_others_share_the_softmax(make, run, backend):
    case = CASES["transition_scores"]["usual"]
    tensors = make(case)
    tensors["x_out"][4, 7] = math.inf
    scores = run("transition_scores", case, tensors, backend)
    visual = tensors["visual"].clone()
    place = int(visual[:4].sum())
    visual[4] = False
    expected = run("transition_scores", case, {**tensors, "visual": visual}, backend)
    assert scores[place] == 0
    rest = torch.cat([scores[:place], scores[place + 1 :]])
    torch.testing.assert_close(rest, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("cell", [0.999, 1e-6, 1e-300, 5e-324])
def test_a_cell_smaller_than_a_token_is_a_token(generator, device, backend, cell):
    features = torch.randn(36, 4, generator=generator).to(device)
    importance = torch.rand(36, generator=generator).to(device)
    expected = recycle(features, importance, 6, 12, 1, backend=backend)
    assert_alike(recycle(features, importance, 6, 12, cell, backend=backend), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_cells_as_large_and_rows_as_long_as_numbers_go_are_one(generator, device, backend):
    features = torch.randn(6, 4, generator=generator).to(device)
    importance = torch.rand(6, generator=generator).to(device)
    expected = recycle(features, importance, 3, 2, 3, backend=backend)
    assert_alike(recycle(features, importance, 3, 2, 1.7e308, backend=backend), expected)
    alone = recycle(features, importance, 1 << 40, 3, 1, backend=backend)
    assert_alike(alone, recycle(features, importance, 6, 3, 1, backend=backend))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_importance_is_the_lowest_and_weighs_nothing(device, backend):
    features = torch.tensor([[1.0], [2.0], [4.0], [8.0]], device=device)
    importance = torch.tensor([math.nan, 1.0, -math.inf, 3.0], device=device)
    kept, _ = recycle(features, importance, 1, 3, 1, backend=backend)
    assert kept.tolist() == [1, 2, 3]
    kept, folded = recycle(features, importance, 1, 1, 4, backend=backend)
    assert (kept.tolist(), folded.tolist()) == ([3], [[(2 + 3 * 8) / 4]])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weights_without_a_finite_sum_are_even(device, backend):
    features = torch.tensor([[1.0], [3.0]], device=device)
    importance = torch.full((2,), 3e38, device=device)
    _, folded = recycle(features, importance, 2, 1, 2, backend=backend)
    assert folded.tolist() == [[2.0]]


def test_destinations_beyond_the_blocks_are_refused(device):
    cache, blocks = torch.zeros(3, 1, 4, 2, device=device), torch.tensor([2, 0], device=device)
    source = torch.arange(3, 8, device=device)[None]
    lag_compact(cache, blocks, source, 3)
    for begin in (4, -1):
        with pytest.raises(ValueError, match=f"hold the destinations {begin}"):
            lag_compact(cache, blocks, source, begin)
