"""The quality harness without its server: questions, intervals, stored answers, table, gate."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.common import write_whole
from bench.lm_eval import make_data, pictures
from bench.quality import ask as quality_ask
from bench.quality import gate as quality_gate
from bench.quality.cells import Cell, all_methods, axes_of, make_cells
from bench.quality.hf import greedy
from bench.quality.plot import draw, pareto
from bench.quality.report import Row, csv_text, make_rows, markdown, pooled, wilson, wins
from bench.quality.store import HF, SERVED, Answers, model_hash
from bench.tasks.held_out import TASKS, Levels, is_right, item, tasks_at
from tokenprune.errors import TokenPruneError
from tokenprune.request import parse_pruning

EASY = Levels(text=0)
CELL = Cell("digit", "visual", "uniform", 0.25)
HEADER = {"model": "a" * 64, "seed": 0}
ENGINE = {"num_layers": 8, "prune_layers": [2, 3, 5]}


def row(method: str = "random", right: int = 50, **fields: Any) -> Row:
    values: dict[str, Any] = {
        "task": "digit",
        "axis": "visual",
        "keep_ratio": 1.0 if method == "off" else 0.25,
        "n": 100,
        "seen": 144.0,
        "kept": 144.0 if method == "off" else 72.0,
        "hf_n": 20,
        "hf_same": 20,
        "hf_right": 10,
    }
    return Row(**{**values, "method": method, "right": right, **fields})


def answer(asked: Any, text: str = "7", **fields: Any) -> dict[str, Any]:
    counts = {"tokens": [1, 2], "seen": 144, "kept": 72.0}
    return {"item": asked.digest, "text": text, **counts, **fields}


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # figures of scipy.stats.binomtest(...).proportion_ci(method="wilson")
        pytest.param(0, 10, 0.0, 0.2775, id="none-right"),
        pytest.param(10, 10, 0.7225, 1.0, id="all-right"),
        pytest.param(8, 10, 0.4902, 0.9433, id="few"),
        pytest.param(475, 500, 0.9272, 0.9659, id="many"),
    ],
)
def test_wilson_equals_published_values(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_refuses_impossible_counts() -> None:
    for right, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="right must be"):
            wilson(right, n)


@pytest.mark.parametrize("task", TASKS)
def test_a_question_depends_on_its_number_alone_and_fits_its_room(task: str) -> None:
    from bench.tasks.vocabulary import encode

    first = item(task, 3, 0, EASY)
    again = item.__wrapped__(task, 3, 0, EASY)
    assert (first.digest, first.text, first.answer) == (again.digest, again.text, again.answer)
    others = [item(task, 4, 0, EASY), item(task, 3, 1, EASY)]
    assert first.digest not in {other.digest for other in others}
    assert len(encode(f" {first.answer}")) < TASKS[task].max_tokens
    assert bool(first.pictures) == ("visual" in axes_of(task))


def test_two_pictures_are_told_apart_in_the_question() -> None:
    shown = [item("digit", index, 0, EASY) for index in range(12)]
    assert {len(asked.pictures) for asked in shown} == {1, 2}
    for asked in shown:
        assert asked.text.startswith("in picture ") == (len(asked.pictures) == 2)


def test_tasks_that_a_level_does_not_show_are_refused() -> None:
    assert list(tasks_at(Levels())) == list(TASKS)
    few = Levels(picture=0)
    assert "read" not in tasks_at(few)
    with pytest.raises(TokenPruneError, match="read must be among the tasks of picture level 0"):
        item("read", 0, 0, few)


def test_longest_answers_fit_their_room() -> None:
    from bench.tasks.data import TEXT_LEVELS

    assert max(level.most_digits for level in TEXT_LEVELS) < TASKS["passkey"].max_tokens


def test_off_and_the_baselines_are_in_every_table() -> None:
    cells = make_cells(["digit", "passkey"], ["transprune"], [0.25, 0.5])
    methods = [(c.method, c.keep_ratio) for c in cells if c.task == "digit"]
    assert methods == [
        ("off", 1.0),
        *((m, r) for m in ("random", "uniform", "transprune") for r in (0.5, 0.25)),
    ]
    documents = {c.method for c in cells if c.task == "passkey" and c.axis == "kv"}
    assert documents == {"off", "random", "streaming"}


def test_visual_methods_stay_away_from_documents() -> None:
    cells = make_cells(["passkey"], ["off", "transprune"], [0.5])
    assert {c.axis for c in cells} <= {"kv", "channels"}
    assert cells[0] == Cell("passkey", "kv", "off", 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((["dgit"], [], [0.5]), "unknown task 'dgit'; known: digit", id="task"),
        pytest.param((["digit"], ["prune"], [0.5]), "unknown method 'prune'", id="method"),
        pytest.param((["digit"], [], [1.0]), r"keep ratios must be in \(0, 1\), got 1", id="ratio"),
    ],
)
def test_unknown_names_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(TokenPruneError, match=message):
        make_cells(*arguments)


def test_request_fields_are_legal_and_random_draws_anew_for_each_question() -> None:
    for cell in make_cells(["digit", "copy"], all_methods(), [0.5]):
        assert parse_pruning(cell.pruning(3)).is_off == (cell.method == "off")
    random = Cell("digit", "visual", "random", 0.5)
    assert random.pruning(3) != random.pruning(4)
    assert CELL.pruning(3) == CELL.pruning(4)


def test_only_white_space_is_forgiven() -> None:
    assert is_right(" top  left\n", "top left")
    for wrong in ("top left.", "Top left", "top", ""):
        assert not is_right(wrong, "top left")


def test_kept_tokens_are_the_mean_over_layers() -> None:
    figures = {
        "visual_tokens": 144,
        "visual_tokens_kept": {"0": 144, "2": 100, "3": 60, "5": 36},
    }
    answer = {"pruning": {"applied": {"visual": "uniform"}}, "usage": {"pruning": figures}}
    expected = (2 * 144 + 100 + 2 * 60 + 3 * 36) / 8
    assert quality_ask.counted(answer, CELL, ENGINE) == (144, expected)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({}, id="no-word-about-pruning"),
        pytest.param({"pruning": {"applied": {"visual": None}}}, id="skipped"),
        pytest.param({"pruning": {"applied": {"visual": "random"}}}, id="another-method"),
    ],
)
def test_an_answer_that_was_not_pruned_as_asked_is_an_error(answer: Any) -> None:
    with pytest.raises(TokenPruneError, match="the server must apply uniform"):
        quality_ask.counted({"usage": {}, **answer}, CELL, ENGINE)


def test_pictures_reach_the_server_without_loss() -> None:
    from base64 import b64decode

    import numpy as np
    from PIL import Image

    asked = item("digit", 0, 0, EASY)
    *shown, text = quality_ask.messages(asked)[0]["content"]
    assert text == {"type": "text", "text": asked.text}
    for part, pixels in zip(shown, asked.pictures, strict=True):
        png = b64decode(part["image_url"]["url"].partition(",")[2])
        assert (np.asarray(Image.open(io.BytesIO(png))) == pixels).all()


def test_answers_survive_closing(tmp_path: Path) -> None:
    path, asked = tmp_path / "answers.jsonl", item("digit", 0, 0, EASY)
    with Answers(path, HEADER) as answers:
        answers.start_run({"git_sha": "abc"})
        answers.add(CELL, 0, SERVED, **answer(asked))
    with Answers(path, HEADER) as answers:
        stored = answers.get(CELL, 0, SERVED, asked.digest)
        assert stored is not None
        assert stored["text"] == "7"
        assert answers.runs == [{"git_sha": "abc"}]
        for cell, index, by in ((CELL, 1, SERVED), (CELL, 0, HF)):
            assert answers.get(cell, index, by, asked.digest) is None
        assert answers.get(Cell("digit", "visual", "uniform", 0.5), 0, SERVED, "x") is None


def test_a_half_written_line_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path, asked = tmp_path / "answers.jsonl", item("digit", 0, 0, EASY)
    with Answers(path, HEADER) as answers:
        for index in range(3):
            answers.add(CELL, index, SERVED, **answer(asked))
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])
        with Answers(path, HEADER) as answers:
            assert answers.get(CELL, 1, SERVED, asked.digest) is not None
            assert answers.get(CELL, 2, SERVED, asked.digest) is None
            answers.add(CELL, 2, SERVED, **answer(asked))
        assert path.read_bytes() == whole


def test_a_header_cut_short_begins_the_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"format":1,"mod')
    Answers(path, HEADER).close()
    assert json.loads(path.read_text()) == {"format": 1, **HEADER}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param(
            {**HEADER, "model": "b" * 64},
            "the model hash must be that of .*a{57}.*b{57}",
            id="model",
        ),
        pytest.param(
            {**HEADER, "seed": 1}, "the setting seed must be that of .*0, got 1", id="seed"
        ),
        pytest.param({"model": HEADER["model"]}, "the setting seed", id="setting-missing"),
    ],
)
def test_answers_of_another_model_or_setting_are_refused(
    header: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path, HEADER).close()
    before = path.read_bytes()
    with pytest.raises(TokenPruneError, match=f"{message}.*--fresh"):
        Answers(path, header)
    assert path.read_bytes() == before
    Answers(path, HEADER).close()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path, HEADER).close()
    with path.open("a") as file:
        file.write('{"task": "dig\n{"run": {}}\n')
    with pytest.raises(TokenPruneError, match=r"line 2 of .* must be a JSON object"):
        Answers(path, HEADER)


def test_an_answer_to_another_question_is_refused(tmp_path: Path) -> None:
    asked = item("digit", 0, 0, EASY)
    with Answers(tmp_path / "answers.jsonl", HEADER) as answers:
        answers.add(CELL, 0, SERVED, **answer(asked))
        with pytest.raises(TokenPruneError, match=r"question 0 of digit .* generators changed"):
            answers.get(CELL, 0, SERVED, "another")


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Answers(path, HEADER), pytest.raises(TokenPruneError, match="another has it"):
        Answers(path, HEADER)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_hash_sees_weights_and_tokenizer_but_not_the_card(model: Path) -> None:
    hashes = [model_hash(model)]
    (model / "README.md").write_text("card")
    (model / quality_gate.RECORD).write_text("{}")
    assert model_hash(model) == hashes[0]
    for name in ("tokenizer.json", "model.safetensors", "chat_template.jinja"):
        (model / name).write_text(name)
        hashes.append(model_hash(model))
    assert all(a != b for a, b in pairwise(hashes))


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(TokenPruneError, match=r"must hold \*.safetensors"):
        model_hash(model)


def add_record(model: Path, right: int) -> None:
    hash_ = model_hash(model)
    rows = [row("off", right), row("random", 0)]
    first = [row("off", 9, n=10)]
    quality_gate.add_served(model, quality_gate.read_record(model), hash_, 0, EASY, rows, first)


def test_the_record_answers_for_the_same_questions(model: Path) -> None:
    add_record(model, 97)
    record, hash_ = quality_gate.read_record(model), model_hash(model)
    assert quality_gate.expected(record, hash_, 0, EASY, 100) == {"digit": 0.97}
    assert quality_gate.expected(record, hash_, 0, EASY, 10) == {"digit": 0.9}
    with pytest.raises(TokenPruneError, match="--record"):
        quality_gate.expected(record, hash_, 1, EASY, 100)
    with pytest.raises(TokenPruneError, match="must be of the model beside it"):
        quality_gate.expected(record, "another", 0, EASY, 100)


def test_the_accuracy_that_training_measured_is_the_second_choice(model: Path) -> None:
    add_record(model, 97)
    families = {"digit": {"accuracy": 0.99, "questions": 80}}
    reached = {"picture_level": 4, "text_level": 2, "families": families}
    record = {**json.loads((model / quality_gate.RECORD).read_text()), "reached": reached}
    write_whole(model / quality_gate.RECORD, json.dumps(record))
    read = quality_gate.read_record(model)
    assert quality_gate.levels_of(read) == Levels(4, 2)
    assert quality_gate.expected(read, model_hash(model), 5, EASY, 100) == {"digit": 0.99}
    add_record(model, 98)
    assert json.loads((model / quality_gate.RECORD).read_text())["reached"] == reached


def test_no_record_and_a_record_of_other_weights_are_errors(model: Path) -> None:
    assert quality_gate.read_record(model) is None
    with pytest.raises(TokenPruneError, match="must hold the accuracy"):
        quality_gate.expected(None, "x", 0, EASY, 100)
    add_record(model, 97)
    (model / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TokenPruneError, match="must be the weights of"):
        quality_gate.read_record(model)
    (model / quality_gate.RECORD).write_text('{"weights": ')
    with pytest.raises(TokenPruneError, match="must be an accuracy record"):
        quality_gate.read_record(model)


@pytest.mark.parametrize(
    ("right", "is_bad"),
    [
        pytest.param(97, False, id="equal"),
        pytest.param(95, False, id="two-points"),
        pytest.param(94, True, id="three-points"),
        pytest.param(100, False, id="better"),
    ],
)
def test_the_gate_closes_beyond_two_points(right: int, is_bad: bool) -> None:
    assert bool(quality_gate.drops([row("off", right)], {"digit": 0.97})) == is_bad
    # pruned rows may be as bad as they are
    assert not quality_gate.drops([row("random", 0)], {"digit": 0.97})


def test_a_task_that_is_not_on_record_closes_the_gate() -> None:
    assert "must be on record" in quality_gate.drops([row("off", 100)], {})[0]


TABLE = [
    row("off", 99),
    row("random", 50),
    row("transprune", 80),
    row("off", 90, task="multikey"),
    row("random", 60, task="multikey", n=500, kept=1234.5, seen=1700.0),
]


def test_the_table_fits_eighty_columns_and_names_a_task_once() -> None:
    longest = [row(m, 500, task=t, n=500, keep_ratio=0.125) for t in TASKS for m in ("transprune",)]
    for rows in (TABLE, longest, [*pooled(TABLE, "visual"), *TABLE]):
        lines = markdown(rows).splitlines()
        assert {len(line) for line in lines} == {len(lines[0])}
        assert len(lines[0]) <= 80
        assert len(lines) == len(rows) + 2
    assert markdown(TABLE).count("digit") == 1


def test_the_csv_holds_every_figure() -> None:
    read = list(csv.DictReader(io.StringIO(csv_text(TABLE))))
    assert [(r["task"], r["method"], int(r["right"])) for r in read] == [
        (r.task, r.method, r.right) for r in TABLE
    ]
    assert float(read[1]["low"]) == pytest.approx(wilson(50, 100)[0], abs=1e-4)


def test_pooled_rows_weigh_questions() -> None:
    pool = {r.method: r for r in pooled(TABLE, "visual")}
    assert (pool["random"].right, pool["random"].n) == (110, 600)
    assert pool["random"].kept == pytest.approx((72 * 100 + 1234.5 * 500) / 600)
    assert pooled(TABLE[:3], "visual") == []


def test_a_win_needs_disjoint_intervals_at_the_same_ratio() -> None:
    assert wins(TABLE, "transprune") == [TABLE[2]]
    close = [row("random", 50), row("transprune", 55), row("transprune", 99, keep_ratio=0.5)]
    assert wins(close, "transprune") == []


def test_unpruned_rows_keep_what_their_prompts_show(tmp_path: Path) -> None:
    asked = [item("digit", index, 0, EASY) for index in range(2)]
    off = Cell("digit", "visual", "off", 1.0)
    with Answers(tmp_path / "answers.jsonl", HEADER) as answers:
        for one in asked:
            answers.add(off, one.index, SERVED, **answer(one, one.answer, seen=0, kept=0))
            answers.add(CELL, one.index, SERVED, **answer(one, "wrong"))
        answers.add(off, 0, HF, **answer(asked[0], asked[0].answer, same=True))
        answers.add(CELL, 1, HF, **answer(asked[1], asked[1].answer, same=False))
        rows = make_rows({off: asked, CELL: asked}, answers)
        assert [(r.right, r.n, r.seen, r.kept) for r in rows] == [(2, 2, 144, 144), (0, 2, 144, 72)]
        assert [(r.hf_n, r.hf_same, r.hf_right) for r in rows] == [(1, 1, 1), (1, 0, 1)]
        with pytest.raises(ValueError, match="has no answer"):
            make_rows({Cell("digit", "visual", "random", 0.5): asked}, answers)


def test_pareto_lines_ascend_and_end_at_the_unpruned_model() -> None:
    rows = [row("off", 99), row("random", 50), row("random", 30, keep_ratio=0.125, kept=50.0)]
    panels = pareto([*rows, row("off", 90, task="passkey", axis="kv")], "visual")
    assert list(panels) == ["digit"]
    assert [point[:2] for point in panels["digit"]["random"]] == [
        (50.0, 0.3),
        (72.0, 0.5),
        (144.0, 0.99),
    ]
    assert panels["digit"]["random"][0][2:] == wilson(30, 100)


def test_a_task_without_methods_has_no_panel() -> None:
    assert pareto([row("off", 90, task="passkey", axis="kv")], "kv") == {}


def test_the_picture_is_drawn_the_same_each_time() -> None:
    files = draw(pareto(TABLE, "visual"), "visual")
    assert files["png"].startswith(b"\x89PNG")
    assert b"<svg" in files["svg"]
    assert draw(pareto(TABLE, "visual"), "visual") == files


END = 2


@pytest.mark.parametrize(
    "guess",
    [
        pytest.param([5, 6, 7, END], id="right"),
        pytest.param([5, 9, 9, 9, 9], id="wrong-and-long"),
        pytest.param([5, END], id="ends-early"),
        pytest.param([5, 6], id="cut-off"),
        pytest.param([], id="empty"),
    ],
)
def test_greedy_repairs_any_guess(guess: list[int]) -> None:
    best = {(): 5, (5,): 6, (5, 6): 7, (5, 6, 7): END}
    calls = []

    def score(tokens: list[int]) -> list[int]:
        calls.append(tokens)
        return [best.get(tuple(tokens[:i]), 9) for i in range(len(tokens))]

    assert greedy(score, guess, END, 8) == [5, 6, 7, END]
    assert (len(calls) == 1) == (guess == [5, 6, 7, END])


def test_greedy_stops_at_its_limit() -> None:
    assert greedy(lambda tokens: [5] * len(tokens), [END], END, 3) == [5, 5, 5]


def test_methods_that_transformers_cannot_check_show_none() -> None:
    assert markdown([row("random", hf_n=0, hf_same=0)]).splitlines()[2].endswith("|    |")


def test_lm_eval_documents_are_the_questions(tmp_path: Path) -> None:
    assert make_data.main(["-n", "8", "--text-level", "0", "--out", str(tmp_path)]) == 0
    files = {
        name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in make_data.FILES
    }
    assert [len(lines) for lines in files.values()] == [8, 8]
    shown = pictures.pictures(files["pictures.jsonl"][0])
    assert shown[0].size == (96, 96)
    folder = Path(make_data.__file__).parent
    for name, lines in files.items():
        task = (folder / f"tokenprune_{name.removesuffix('.jsonl')}.yaml").read_text()
        assert f"test: {make_data.FOLDER / name}" in task
        assert all(line["question"] and line["answer"] for line in lines)
