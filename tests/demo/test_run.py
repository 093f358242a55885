"""The demo without its servers: what it makes of figures, and when it fails."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from tests.demo.figures import AFTER, BEFORE, speed_rows
from tokenprune.demo import builtin, measure, run
from tokenprune.demo.machine import describe_machine
from tokenprune.demo.report import (
    WIDTH,
    changed,
    compact,
    flops_share,
    kv_pool,
    medians,
    metrics_table,
    parse_samples,
    results_table,
    verdict,
)
from tokenprune.demo.run import run_demo
from tokenprune.errors import TokenPruneError
from tokenprune.request import parse_pruning


def _lines(renderable: RenderableType) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=200).print(renderable)
    return [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]


def test_kv_blocks_are_vllms_own_and_leave_the_null_block_out() -> None:
    assert kv_pool(parse_samples(BEFORE)) == (0, 511)
    assert kv_pool(parse_samples(AFTER)) == (152, 511)


def test_page_without_vllms_cache_figures_is_an_error() -> None:
    with pytest.raises(ValueError, match="KV cache usage"):
        kv_pool(parse_samples("tokenprune_kv_bytes_saved 0.0\n"))


def test_only_our_changed_samples_are_listed() -> None:
    assert changed(parse_samples(BEFORE), parse_samples(AFTER)) == [
        ("tokenprune_op_seconds_count", {"op": "instruction_attention"}, None, 12),
        ("tokenprune_op_seconds_sum", {"op": "instruction_attention"}, None, 0.0271),
        ("tokenprune_prefill_flops_total", {"state": "full"}, None, 5.57e12),
        ("tokenprune_prefill_flops_total", {"state": "spent"}, None, 2.228e12),
        ("tokenprune_requests_total", {"outcome": "applied", "visual": "transprune"}, None, 6),
        ("tokenprune_requests_total", {"outcome": "off"}, 2, 3),
    ]


def test_metrics_show_old_and_new_value_within_the_width() -> None:
    lines = _lines(metrics_table(changed(parse_samples(BEFORE), parse_samples(AFTER))))
    assert max(map(len, lines)) <= WIDTH
    assert lines[-1].split() == ["tokenprune_requests_total", "outcome=off", "2", "→", "3"]


def test_longest_metric_line_fits_the_width() -> None:
    longest = ("tokenprune_requests_total", {"outcome": "applied", "visual": "transprune"}, 1, 6)
    name = ("tokenprune_prefill_flops_total", {"state": "spent"}, 1.234e15, 9.876e15)
    lines = _lines(metrics_table([longest, name]))  # type: ignore[list-item]
    assert len(lines) == 2
    assert max(map(len, lines)) <= WIDTH


def test_table_shows_medians_ratios_and_stages_within_the_width() -> None:
    lines = _lines(results_table(speed_rows()))
    assert max(map(len, lines)) <= WIDTH
    off, _, transprune = (line.split() for line in lines[-3:])
    assert off == ["off", "2333", "2304", "152", "3200", "1.00x", "29.0"]
    kept = "2304>1440>288>288"
    assert transprune == ["transprune", "2333", kept, "65", "1600", "0.50x", "32.0"]


def test_saved_medians_are_the_shown_ones() -> None:
    expected = {"ttft_median_seconds": 3.2, "tokens_per_second_median": 29.0}
    assert medians(speed_rows()[0]) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (6, "6"),
        (13824, "13824"),
        (0.0271, "0.027"),
        (0.00041, "4e-04"),
        (2.588, "2.59"),
        (5.57e12, "5.57T"),
        (12.3e6, "12.3M"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert compact(value) == text


def test_verdict_follows_from_the_figures() -> None:
    line, is_good = verdict(speed_rows(), 0.4)
    assert is_good
    assert line == (
        "transprune: 2.3x fewer KV blocks, TTFT 0.50x (prefill FLOPs by formula: 0.40x)"
    )


@pytest.mark.parametrize("blocks", [152, 153, 0], ids=["as-many", "more", "never-seen"])
def test_verdict_admits_that_no_blocks_were_saved(blocks: int) -> None:
    line, is_good = verdict(speed_rows(blocks), None)
    assert not is_good
    assert f"off 152, uniform 65, transprune {blocks}" in line


def test_flops_share_is_over_the_run() -> None:
    share = flops_share(changed(parse_samples(BEFORE), parse_samples(AFTER)))
    assert share == pytest.approx(0.4)
    assert flops_share([]) is None


def test_four_photographs_differ() -> None:
    content = measure.prompt_content(measure.photographs())
    urls = {part["image_url"]["url"] for part in content[:-1]}
    assert len(urls) == 4
    assert content[-1] == {"type": "text", "text": measure.QUESTION}


def test_every_row_asks_for_its_own_method() -> None:
    fields = measure.pruning_fields(0.25)
    assert list(fields) == ["off", *measure.METHODS]
    assert parse_pruning(fields.pop("off")).is_off
    for name, value in fields.items():
        policy = parse_pruning(value).policy("visual")
        assert policy is not None
        assert policy.model_dump(include={"method", "keep_ratio"}) == {
            "method": name,
            "keep_ratio": 0.25,
        }


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "nan", "half"])
def test_ratio_that_prunes_nothing_is_refused(
    ratio: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_demo(["--keep-ratio", ratio])
    assert exit_.value.code == 2
    assert "must be in (0, 1)" in capsys.readouterr().err


def test_result_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_demo(["--json", str(tmp_path / "missing" / "demo.json")])
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("answers_good", "speed_good", "status"),
    [(True, True, 0), (False, True, 1), (True, False, 1)],
)
def test_either_part_decides_the_exit_status_and_both_are_saved(
    answers_good: bool,
    speed_good: bool,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "_compare_answers", lambda *_: ({"verdict": "a"}, answers_good))
    monkeypatch.setattr(run, "_compare_speed", lambda *_: ({"verdict": "b"}, speed_good))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    file = tmp_path / "demo.json"
    with nullcontext() if status == 0 else pytest.raises(SystemExit, match="1"):
        run_demo(["--keep-ratio", "0.25", "--json", str(file)])
    record = json.loads(file.read_text())
    assert record["keep_ratio"] == 0.25
    assert (record["answers"], record["speed"]) == ({"verdict": "a"}, {"verdict": "b"})


def test_a_damaged_model_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise TokenPruneError("the weights are damaged")

    monkeypatch.setattr(builtin, "model_folder", refuse)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(TokenPruneError, match="damaged"):
        run_demo([])


def test_machine_description_holds_no_path() -> None:
    assert "/" not in json.dumps(describe_machine()).replace("+cpu", "")
