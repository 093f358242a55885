"""The worked example of the specification: seven tokens, two pruning stages, paper and code."""

import pytest
import torch

from tokenprune.kernels import (
    instruction_attention,
    instruction_attention_reference,
    transition_scores,
    transition_scores_reference,
)

VISUAL = [False, True, True, True, True, False, False]
SURVIVORS = [0, 1, 2, 3, 5, 6]
CODE = {"signed": True, "scope": "all"}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-6, "atol": 1e-7}


def _float64(operator):
    def run(*tensors, **options):
        result = operator(*tensors, **options)
        assert result.dtype == torch.float64
        return result

    return run


def _float32(operator, backend):
    def run(*tensors, **options):
        tensors = [x.float() if x.is_floating_point() else x for x in tensors]
        result = operator(*tensors, backend=backend, **options)
        assert result.dtype == torch.float32
        return result

    return run


@pytest.fixture(params=["reference-float64", "torch", "triton"])
def operators(request):
    if request.param == "reference-float64":
        return (
            _float64(transition_scores_reference),
            _float64(instruction_attention_reference),
            EXACT,
        )
    return (
        _float32(transition_scores, request.param),
        _float32(instruction_attention, request.param),
        FLOAT32,
    )


class Example:
    """The operators on the example's inputs, for the rows that are still there."""

    def __init__(self, golden, device, operators):
        self.golden, self.device = golden, device
        self.transition, self.attention, self.tolerance = operators

    def rows(self, stage):
        return list(range(7)) if stage == "A" else SURVIVORS

    def tensor(self, name):
        return torch.tensor(self.golden[name], dtype=torch.float64, device=self.device)

    def visual(self, stage):
        return torch.tensor(VISUAL, device=self.device)[self.rows(stage)]

    def ttv(self, stage, sub_module, visual=None, **options):
        x_in, x_out = (
            self.tensor(f"TP.{stage}_{sub_module}_{side}")[self.rows(stage)]
            for side in ("in", "out")
        )
        visual = self.visual(stage) if visual is None else visual
        return self.transition(x_in, x_out, visual, **options)

    def ttv_sum(self, stage, **options):
        return self.ttv(stage, "attn", **options) + self.ttv(stage, "ffn", **options)

    def iga(self, stage):
        rows = self.rows(stage)
        q_rows = torch.tensor([len(rows) - 2, len(rows) - 1], device=self.device)
        q, k = self.tensor(f"TP.{stage}_q"), self.tensor(f"TP.{stage}_k")[:, rows]
        return self.attention(q, k, q_rows, self.visual(stage), scale=2**-0.5)


@pytest.fixture
def example(golden, device, operators):
    return Example(golden, device, operators)


def _share(x):
    return x / (x.sum() + 1e-8)


def _keep(score, k):
    return sorted(score.topk(k).indices.tolist())


@pytest.mark.parametrize("sub_module", ["attn", "ffn"])
def test_paper_scores_of_a_sub_module(example, golden, assert_matches, sub_module):
    expected = golden[f"tp.A.ttv_{sub_module}(paper, image tokens)"]
    assert_matches(example.ttv("A", sub_module), expected, **example.tolerance)


@pytest.mark.parametrize("sub_module", ["attn", "ffn"])
def test_code_scores_of_a_sub_module(example, golden, assert_matches, sub_module):
    every_row = torch.ones(7, dtype=torch.bool, device=example.device)
    expected = golden[f"tp.A.ttv_{sub_module}(code, all tokens)"]
    actual = example.ttv("A", sub_module, visual=every_row, **CODE)
    assert_matches(actual, expected, **example.tolerance)
    only_visual = example.ttv("A", sub_module, **CODE)
    assert_matches(only_visual, expected[1:5], **example.tolerance)


def test_scores_of_a_layer(example, golden, assert_matches):
    paper, code = example.ttv_sum("A"), example.ttv_sum("A", **CODE)
    assert_matches(paper, golden["tp.A.ttv(paper, image tokens)"], **example.tolerance)
    assert_matches(code, golden["tp.A.ttv(code, all tokens)"][1:5], **example.tolerance)
    pruned = example.ttv_sum("B", **CODE)
    expected = golden["tp.B.ttv(code, all surviving tokens)"][1:4]
    assert_matches(pruned, expected, **example.tolerance)


@pytest.mark.parametrize("stage", ["A", "B"])
def test_instruction_attention(example, golden, assert_matches, stage):
    assert_matches(example.iga(stage), golden[f"tp.{stage}.iga"], **example.tolerance)


def test_the_first_stage_keeps_what_the_paper_keeps(example, golden, assert_matches):
    score = 0.5 * example.ttv_sum("A") + 0.5 * example.iga("A")
    assert_matches(score, golden["tp.A.score(paper)"], **example.tolerance)
    assert _keep(score, 3) == golden["tp.A.keep3(paper) original image index"]


def test_the_first_stage_keeps_what_the_code_keeps(example, golden, assert_matches):
    score = 0.5 * _share(example.ttv_sum("A", **CODE)) + 0.5 * _share(example.iga("A"))
    assert_matches(score, golden["tp.A.score(code)"], **example.tolerance)
    assert _keep(score, 3) == golden["tp.A.keep3(code) original image index"]


def test_the_second_stage_keeps_what_the_code_keeps(example, golden, assert_matches):
    total = example.ttv_sum("A", **CODE)[:3] + example.ttv_sum("B", **CODE)
    assert_matches(total, golden["tp.B.accumulated_ttv(image)"], **example.tolerance)
    score = 0.5 * _share(total) + 0.5 * _share(example.iga("B"))
    assert_matches(score, golden["tp.B.score(code, alpha=.5)"], **example.tolerance)
    kept = [SURVIVORS[1:4][i] for i in _keep(score, 1)]
    assert kept == golden["tp.B.keep1 original position"]
