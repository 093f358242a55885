"""What the page says about quality is what the committed results say, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.publish.quality_tables import block, committed
from bench.quality import output as quality_output
from bench.quality.cells import AXES
from bench.quality.output import FIGURES, SUMMARY, read_results, summarize, write_results
from bench.quality.report import Row, csv_text, read_csv, verdict, with_pools
from bench.quality.store import model_hash
from bench.tasks.held_out import Levels
from tokenprune.errors import TokenPruneError
from tokenprune.policies import methods

RIGHT = {
    **{"off": 496, "random": 301, "uniform": 333, "transprune": 477},
    **{"streaming": 222, "lagkv": 444},
}


def make_rows(axis: str) -> list[Row]:
    rows = []
    for name in AXES[axis].tasks:
        rows.append(Row(name, axis, "off", 1.0, 500, RIGHT["off"], 144.0, 144.0, 20, 20, 20))
        rows += [
            Row(name, axis, method, ratio, 500, RIGHT[method], 144.0, 70.97, 20, 20, 19)
            for method in methods(axis)
            if method in RIGHT
            for ratio in (0.5, 0.25, 0.125)
        ]
    return with_pools(rows)


ROWS = make_rows("visual")
RUN = {"git_sha": "0123456789abcdef", "git_dirty": False}


def summary(**fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"model": "a" * 64, "seed": 0, "n": 500, "pruned_n": [500]}
    values |= {"levels": Levels(3, 6), "axes": ["visual"], "runs": [RUN]}
    return summarize(**{**values, **fields})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def results(tmp_path: Path, model: Path) -> Path:
    for axis in AXES:
        facts = summary(model=model_hash(model), axes=[axis])
        write_results(tmp_path / "results" / axis, make_rows(axis), facts)
    return tmp_path / "results"


def test_rows_survive_the_csv() -> None:
    assert read_csv(csv_text(ROWS)) == ROWS


@pytest.mark.parametrize("text", ["task,axis\ndigit,visual\n", "{}\n1\n"])
def test_another_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a table|invalid literal"):
        read_csv(text)


def test_the_block_fits_eighty_columns_and_names_everything() -> None:
    text = block(ROWS, summary(), "folder")
    long = [line for line in text.splitlines() if len(line) > 80]
    assert long == []
    (heads,) = (line for line in text.splitlines() if line.startswith("| method"))
    assert heads.replace("|", " ").split() == ["method", *AXES["visual"].tasks]
    assert "0.25" in text
    assert "| off        |  99.2 |" in text
    for name in ("quality.md", "quality.csv", "quality-visual.png"):
        assert f"](folder/{name})" in text


def test_documents_tell_how_kv_methods_were_set() -> None:
    text = block(make_rows("kv"), summary(axes=["kv"]), "folder")
    assert "KV methods with sink 16, lag 128." in " ".join(text.split())
    assert "](folder/quality-kv.png)" in text
    assert "things a picture" not in text


def test_facts_tell_few_questions_and_changed_code() -> None:
    runs = [{**RUN, "git_dirty": True}]
    text = quality_output.facts(summary(n=100, pruned_n=[8, 25], runs=runs))
    assert "100 held-out questions a cell, 8 to 25 where pruned" in text
    assert "commit 0123456 with changes" in text
    assert "where pruned" not in quality_output.facts(summary())


def test_the_verdict_tells_losses_too() -> None:
    fields = ("visual", "x", 0.25, 100, 0, 144.0, 70.0, 0, 0, 0)
    base = Row("digit", *fields)

    def of(task: str, method: str, right: int) -> Row:
        return Row(**{**vars(base), "task": task, "method": method, "right": right})

    rows = [
        *(of("digit", "random", 10), of("digit", "transprune", 90)),
        *(of("read", "random", 90), of("read", "transprune", 10)),
        *(of("count", "random", 50), of("count", "transprune", 52)),
    ]
    assert verdict(rows).endswith("above in digit (0.25); below in read (0.25).")
    assert verdict(rows[4:]).endswith("above in no task; below in no task.")
    assert verdict([row for row in rows if row.method != "random"]) == ""


def test_results_of_another_model_are_refused(results: Path, model: Path) -> None:
    for axis in AXES:
        assert f"(../bench/results/quality/{axis}/" in committed(axis, model, results)[1]
    (model / "model.safetensors").write_bytes(b"others")
    with pytest.raises(TokenPruneError, match="must be of the model"):
        committed("visual", model, results)


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def halve(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])


def edit(folder: Path, name: str) -> None:
    file = folder / name
    file.write_text(file.read_text().replace(f",{RIGHT['random']},", ",302,", 1))


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        pytest.param(drop, SUMMARY, "got no such file", id="no-summary"),
        pytest.param(drop, FIGURES, "got no such file", id="no-figures"),
        pytest.param(halve, SUMMARY, "must be whole", id="half-a-summary"),
        pytest.param(halve, FIGURES, "must be", id="half-the-figures"),
        pytest.param(edit, FIGURES, "got others", id="a-figure-changed-by-hand"),
    ],
)
def test_damaged_results_are_refused(
    damage: Callable[[Path, str], None], name: str, message: str, results: Path
) -> None:
    damage(results / "visual", name)
    with pytest.raises(TokenPruneError, match=f"{message}.*make quality"):
        read_results(results / "visual")


def test_the_summary_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(quality_output, "write_whole", lambda path, _: written.append(path.name))
    write_results(tmp_path, ROWS, summary())
    assert written[-1] == SUMMARY
    assert set(written) > {FIGURES, "quality.md", "quality-visual.png"}


def test_the_summary_holds_no_path_of_this_machine(results: Path) -> None:
    text = (results / "visual" / SUMMARY).read_text()
    assert str(results.parent) not in json.dumps(json.loads(text))
