"""The operator bench has a case for every operator, and its cases are right."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from bench.ops.__main__ import show
from bench.ops.cases import BENCHES, OPERATORS, Draw, call_of
from tokenprune import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(op, case) for op, bench in BENCHES.items() for case in bench.sizes]


def test_every_operator_has_a_case() -> None:
    assert set(BENCHES) == set(OPERATORS)
    assert all(bench.sizes for bench in BENCHES.values())
    # what is exported beside operators and references is listed here, so that none is forgotten
    rest = set(kernels.__all__) - {*OPERATORS, *(f"{op}_reference" for op in OPERATORS)}
    assert rest == {"ROW_FIELDS", "pack", "places_of"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_a_tiny_case_is_right_in_triton(
    monkeypatch: pytest.MonkeyPatch, op: str, case: str, dtype: torch.dtype
) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    call = call_of(op, case, Draw(DEVICE, dtype), is_tiny=True)
    assert call.op == op
    assert call.num_bytes > 0
    assert call.is_right()
    call.bound("torch")()


@pytest.mark.parametrize("op", BENCHES)
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    call = call_of(op, next(iter(BENCHES[op].sizes)), Draw(DEVICE, torch.float32), is_tiny=True)
    right = getattr(kernels, f"{op}_reference")

    def wrong(*arguments: object, backend: str, **options: object) -> object:
        result = right(*arguments, **options)
        written = options[call.written] if call.written else result
        last = written[-1] if isinstance(written, tuple) else written
        assert isinstance(last, torch.Tensor)
        last.view(-1)[0] += 1
        return result

    monkeypatch.setattr(kernels, op, wrong)
    assert not call.is_right()


def test_sizes_of_a_case_are_all_replaced_or_all_real() -> None:
    for op, bench in BENCHES.items():
        for case, sizes in bench.sizes.items():
            assert set(bench.tiny) == set(sizes), (op, case)


def test_the_table_fits_into_eighty_columns() -> None:
    points = [1234.567] * 3
    line = {"right": True, "bytes": 10**9, "p10_p50_p90_ms": {"triton": points, "torch": points}}
    found = {op: dict.fromkeys(bench.sizes, line) for op, bench in BENCHES.items()}
    found["recycle"] = {case: {"right": False} for case in found["recycle"]}
    console = Console(width=80, record=True)
    console.print(show("title", found, 100.0))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert text.count("WRONG") == 2
    # nothing was broken into two lines
    rows = sum(1 + 2 * len(cases) for op, cases in found.items()) - len(found["recycle"])
    assert len(text.rstrip().splitlines()) == rows + 2


def test_a_case_has_the_same_numbers_on_every_run() -> None:
    one, other = (call_of("lag_keep", "qwen3-8b", Draw(DEVICE, torch.float32)) for _ in range(2))
    assert torch.equal(one.tensors["scores"], other.tensors["scores"])
