"""The serving benchmark without its servers: what it sends, refuses and says."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.common import command_line, manifest, quantiles
from bench.serving import run as bench_serve
from bench.serving.load import Answer, Burst, StockServer, preemptions, questions
from bench.serving.report import cells_table, mean_ratio, ratios, summary, verdicts
from tokenprune.request import parse_pruning


def answer(tokens: list[int], applied: str | None = None, ttft: float = 100.0) -> Answer:
    return Answer(ttft, [10.0, 30.0], tokens, applied, 605)


def burst(seconds: float, count: int = 4, ttft: float = 100.0) -> Burst:
    return Burst(seconds, [answer([1, 2, 3], ttft=ttft)] * count)


def cell(variant: str, bursts: list[Burst], cells: Any, *, wrong: bool = False) -> dict[str, Any]:
    figures = {"kv_mib_peak": 123.45, "preemptions": 12}
    return summary(32, variant, bursts, wrong) | figures | ratios(32, variant, cells)


@pytest.fixture
def bursts() -> dict[tuple[int, str], list[Burst]]:
    return {
        (32, "stock"): [burst(2.0), burst(4.0), burst(2.0)],
        (32, "off"): [burst(2.0), burst(4.0), burst(1.0)],
        (32, "transprune"): [burst(4.0, ttft=12345.6), burst(8.0), burst(0.5)],
    }


@pytest.fixture
def cells(bursts: dict[tuple[int, str], list[Burst]]) -> list[dict[str, Any]]:
    return [cell(variant, found, bursts) for (_, variant), found in bursts.items()]


def shown(cells: list[dict[str, Any]]) -> list[str]:
    console = Console(width=80, file=io.StringIO())
    console.print(cells_table(cells))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_quantiles_interpolate_between_neighbours() -> None:
    assert quantiles([3.0, 1.0, 2.0]) == pytest.approx([1.2, 2.0, 2.8])
    assert quantiles([7.0]) == [7.0, 7.0, 7.0]


def test_the_recorded_command_says_nothing_of_where_the_result_went() -> None:
    arguments = ["--rounds", "2", "--out", "/somewhere/x.jsonl", "--quick"]
    assert command_line("bench.x", arguments) == "python -m bench.x --rounds 2 --quick"
    assert command_line("bench.x", ["--out=/somewhere/x"]) == "python -m bench.x"


def test_the_manifest_holds_no_path_or_name_of_this_machine() -> None:
    found = manifest("bench.x", 1)
    del found["command"]  # pytest's own arguments here
    text = str(found)
    for private in (str(Path.home()), str(Path.cwd()), os.uname().nodename):
        assert len(private) < 3 or private not in text
    assert found["machine"]["versions"]["torch"]


def test_ratios_pair_the_rounds_so_that_a_slow_minute_hurts_both(
    bursts: dict[tuple[int, str], list[Burst]],
) -> None:
    assert ratios(32, "off", bursts)["ratio_rounds"] == [1.0, 1.0, 2.0]
    assert ratios(32, "off", bursts)["ratio"] == 1.0
    assert ratios(32, "off", bursts)["reference"] == "stock"
    pruned = ratios(32, "transprune", bursts)
    assert (pruned["reference"], pruned["ratio_rounds"]) == ("off", [0.5, 0.5, 2.0])
    assert ratios(32, "stock", bursts) == {}
    del bursts[32, "stock"]
    assert ratios(32, "off", bursts) == {}


def test_a_summary_keeps_every_sample(bursts: dict[tuple[int, str], list[Burst]]) -> None:
    found = summary(32, "off", bursts[32, "off"], False)
    assert found["requests_per_second"] == 2.0
    assert found["tokens_per_second"] == 6.0
    assert found["token_ms"][1] == 20.0
    assert found["stall_ms"][1] == 30.0
    assert [len(r["ttft_ms"]) for r in found["rounds"]] == [4, 4, 4]


def test_the_table_fits_80_columns(cells: list[dict[str, Any]]) -> None:
    lines = shown(cells)
    assert all(len(line.rstrip()) <= 80 for line in lines)
    row = next(line for line in lines if "transprune" in line)
    assert "…" not in row
    assert "0.50x" in row
    assert "123.5" in row or "123.4" in row


def test_a_wrong_variant_shows_no_figure(bursts: dict[tuple[int, str], list[Burst]]) -> None:
    wrong = [cell("off", bursts[32, "off"], bursts, wrong=True)]
    row = next(line for line in shown(wrong) if "off" in line)
    assert row.split() == ["32", "off", "WRONG"]
    assert verdicts(wrong) == ["off: WRONG answers, so no figures"]


def test_verdicts_name_the_cells_below_their_target(cells: list[dict[str, Any]]) -> None:
    off, pruned = verdicts(cells)
    assert off == ("off over stock: 1.26x +-0.58 over 3 rounds, loads 1.00x to 1.00x; all >= 0.99")
    assert pruned.endswith("below 0.98 at 32")


def test_the_mean_ratio_says_how_sure_it_is() -> None:
    assert mean_ratio([0.5, 2.0]) == "1.00x"
    assert mean_ratio([1.1] * 4) == "1.10x +-0.00"


@pytest.mark.parametrize("variant", bench_serve.VARIANTS)
def test_every_variant_sends_fields_the_server_takes(variant: str) -> None:
    for field in bench_serve.fields_of(variant, 0.125):
        assert field is None or parse_pruning(field).policy("visual") is not None
    assert (None in bench_serve.fields_of(variant, 0.5)) == (variant in ("off", "mixed"))


def test_no_two_questions_are_alike() -> None:
    asked = list(itertools.islice(questions(1, 2), 40))
    pictures = [p["image_url"]["url"] for q in asked for p in q[0]["content"][:-1]]
    texts = [q[0]["content"][-1]["text"] for q in asked]
    assert len(set(pictures)) == 80
    assert len(set(texts)) == 40
    assert len({len(text) for text in texts}) == 1
    assert asked == list(itertools.islice(questions(1, 2), 40))


@pytest.mark.parametrize("is_cpu", [True, False])
def test_the_baseline_is_plain_vllm(tmp_path: Path, is_cpu: bool) -> None:
    server = StockServer(tmp_path, ["--flag"], tmp_path / "log", is_cpu=is_cpu)
    command = server._command
    assert "vllm.entrypoints.openai.api_server" in command
    assert not any("tokenprune" in word for word in command[4:])
    assert ("VLLM_USE_V2_MODEL_RUNNER=0" in command) == is_cpu


def test_preemptions_are_added_over_engines() -> None:
    name = "vllm:num_preemptions_total"
    samples = {(name, (("engine", "0"),)): 2.0, (name, (("engine", "1"),)): 3.0, ("x", ()): 9.0}
    assert preemptions(samples) == 5


VARIANTS = ["stock", "off", "uniform", "transprune"]


def check(monkeypatch: pytest.MonkeyPatch, tokens: dict[str, list[int]]) -> set[str]:
    """Run the first check on servers that give `tokens` by server or method."""

    def run(server: str, prompts: Any, fields: Any, *args: Any) -> Burst:
        field = fields[0]
        if field is not None:
            assert field["visual"]["keep_ratio"] == 1
        key = server if field is None else field["visual"]["method"]
        return Burst(1.0, [answer(tokens.get(key, [1, 2, 3])) for _ in prompts])

    monkeypatch.setattr(bench_serve, "run_burst", run)
    servers = {"stock": "stock"} | dict.fromkeys(VARIANTS[1:], "ours")
    return bench_serve.refcheck(servers, VARIANTS, iter([[]] * 20), 3)


def test_equal_tokens_pass_the_first_check(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, {}) == set()


def test_a_method_that_changes_what_it_keeps_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, {"uniform": [1, 2, 4]}) == {"uniform"}


def test_nothing_counts_where_off_differs_from_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, {"stock": [9]}) == set(VARIANTS)


@pytest.mark.parametrize(("applied", "is_right"), [("uniform", True), (None, False)])
def test_a_method_that_was_not_applied_is_wrong(
    monkeypatch: pytest.MonkeyPatch, applied: str | None, is_right: bool
) -> None:
    def run(server: Any, prompts: Any, *args: Any, **kwargs: Any) -> Burst:
        return Burst(1.0, [answer([1], applied) for _ in prompts])

    monkeypatch.setattr(bench_serve, "run_burst", run)
    options = bench_serve.parse(["--variants", "uniform"])
    prompts = iter([[]] * 99)
    _, found = bench_serve.measure(None, "uniform", 4, options, prompts, timed=True)
    assert found == is_right


def test_options_say_what_is_wrong_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_serve.parse(["--variants", "off,nothing"])
    assert "must be among" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_serve.parse(["--tokens", "1"])
    assert bench_serve.parse(["--variants", "uniform"]).variants == ["off", "uniform"]
    assert bench_serve.parse(["--quick"]).rounds == 1
