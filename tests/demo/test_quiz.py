"""The demo's questions: whole as shipped, asked many at a time, and counted."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.demo.figures import quiz_rows
from tokenprune.demo import quiz
from tokenprune.demo.local_server import LocalServer
from tokenprune.demo.quiz import METHODS, Question, QuizRow, ask_questions, load_questions
from tokenprune.demo.quiz_report import example, quiz_table, quiz_verdict
from tokenprune.demo.report import WIDTH
from tokenprune.errors import InstallationError, TokenPruneError


def test_shipped_questions_are_of_every_kind_and_small() -> None:
    questions = load_questions()
    assert len(questions) == 48
    families = {"digit", "shape", "colour", "where", "at", "count", "read"}
    assert {question.family for question in questions} == families
    assert {len(question.pictures) for question in questions} == {1, 2}
    pictures = {picture for question in questions for picture in question.pictures}
    assert pictures == set(quiz.FOLDER.glob("*.png"))
    assert len(pictures) == 12
    assert sum(path.stat().st_size for path in quiz.FOLDER.iterdir()) < 300_000


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    entry = {"pictures": ["a.png"], "family": "at", "question": "what?", "answer": "a"}
    (tmp_path / quiz.INDEX).write_text(json.dumps({"questions": [entry]}))
    with pytest.raises(InstallationError, match=r"a\.png must come with tokenprune.*reinstall"):
        load_questions(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{}", '{"questions": [{"pictures": []}]}', '{"questions": [1]}']
)
def test_a_damaged_list_of_questions_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / quiz.INDEX).write_text(content)
    with pytest.raises(InstallationError, match=r"questions\.json must.*reinstall"):
        load_questions(tmp_path)


@pytest.mark.parametrize(
    ("answer", "expected"), [("7", True), (" 7\n", True), ("7 7", False), ("", False)]
)
def test_only_the_exact_answer_is_right(answer: str, expected: bool) -> None:
    assert Question((), "digit", "which?", "7").is_right(answer) == expected


def test_table_shows_answers_blocks_and_stages_within_the_width() -> None:
    file = io.StringIO()
    Console(file=file, width=200).print(quiz_table(quiz_rows()))
    lines = [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]
    assert max(map(len, lines)) <= WIDTH
    assert lines[-4].split() == ["off", "46/48", "288", "80", "50"]
    assert lines[-1].split() == ["transprune", "44/48", "288>180>36>36", "37", "50"]


def test_verdict_follows_from_the_figures() -> None:
    line = "transprune: 44/48 right against 46/48 unpruned, with 2.2x fewer KV blocks"
    assert quiz_verdict(quiz_rows()) == (line, True)


def test_a_model_that_fails_unpruned_is_no_measure() -> None:
    assert quiz_verdict(quiz_rows((41, 41, 41, 41)))[1]
    line, is_good = quiz_verdict(quiz_rows((40, 48, 48, 48)))
    assert not is_good
    assert line == "the unpruned model must answer 85% of the questions right, got 40/48"


@pytest.mark.parametrize("blocks", [80, 81, 0], ids=["as-many", "more", "never-seen"])
def test_verdict_admits_that_no_blocks_were_saved(blocks: int) -> None:
    line, is_good = quiz_verdict(quiz_rows(blocks=blocks))
    assert not is_good
    assert f"off 80, random {blocks}" in line


def test_example_is_the_first_that_pruning_got_wrong() -> None:
    questions = [Question((Path("a.png"),), "digit", f"which {n}?", str(n)) for n in range(3)]
    rows = [QuizRow("off", answers=["0", "1", "2"]), QuizRow("random", answers=["0", "9", "8"])]
    assert [line.split() for line in example(questions, rows)] == [
        ["a.png:", "which", "1?"],
        ["right", "answer", "1"],
        ["off", "1", "(right)"],
        ["random", "9", "(wrong)"],
    ]
    rows[1].answers = ["0", "1", "2"]
    assert example(questions, rows)[0] == "a.png: which 0?"


class Service(LocalServer):
    """Answers each question with its own text; the metrics page says how long its method is."""

    applies: str | None = None

    def __init__(self, log: Path) -> None:
        super().__init__(None, [], log)
        self.asked: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        # the first questions wait for each other: fewer at a time never get on
        self.together = threading.Barrier(quiz.CONCURRENCY)

    def metrics(self) -> dict[Any, float]:
        pruned = self.asked[-1]["pruning"] != "off"
        return {
            ("vllm:kv_cache_usage_perc", ()): (37 if pruned else 80) / 100,
            ("vllm:cache_config_info", (("num_gpu_blocks", "101"),)): 1.0,
        }

    def answer(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self.lock:
            self.asked.append(body)
            number = len(self.asked)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        if len(METHODS) + 1 < number <= len(METHODS) + 1 + quiz.CONCURRENCY:
            self.together.wait(30)
        text = body["messages"][0]["content"][-1]["text"]
        for word in (text.split()[-1], " "):
            yield {"choices": [{"index": 0, "delta": {"content": word}}]}
        method = "off" if body["pruning"] == "off" else body["pruning"]["visual"]["method"]
        words = {"applied": {"visual": None if method == "off" else self.applies or method}}
        figures = {} if method == "off" else {"pruning": {"visual_tokens_kept": {}}}
        usage: dict[str, Any] = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
        yield {"choices": [], "usage": usage | figures, "pruning": words}
        with self.lock:
            self.running -= 1


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    made = Service(tmp_path / "log")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for chunk in made.answer(body):
                common = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
                self.wfile.write(f"data: {json.dumps(common | chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        made.url = f"http://127.0.0.1:{http.server_port}"
        yield made
        http.shutdown()


QUESTIONS = [Question((), "digit", f"which {n}", str(n)) for n in range(9)]


def test_questions_are_asked_several_at_a_time_and_counted(service: Any) -> None:
    advanced: list[None] = []
    questions = [*QUESTIONS, Question((), "digit", "which 9", "other")]
    rows = ask_questions(service, questions, 0.25, lambda: advanced.append(None))
    assert len(advanced) == len(service.asked) == quiz.num_requests(questions) == 44
    assert service.most_running == quiz.CONCURRENCY
    assert [row.method for row in rows] == ["off", *METHODS]
    for row in rows:
        assert [answer.strip() for answer in row.answers] == [str(n) for n in range(10)]
        assert row.num_right == 9
        assert len(row.ttft_seconds) == 10
        assert min(row.ttft_seconds) > 0
        assert row.kv_blocks == (80 if row.method == "off" else 37)


def test_random_draws_anew_for_each_question(service: Any) -> None:
    ask_questions(service, QUESTIONS, 0.25, lambda: None)
    fields = [
        SimpleNamespace(**a["pruning"]["visual"]) for a in service.asked if a["pruning"] != "off"
    ]
    assert {field.keep_ratio for field in fields} == {0.25}
    seeds = [field.seed for field in fields if field.method == "random"]
    # the first is the request for the KV blocks
    assert sorted(seeds) == [0, *range(len(QUESTIONS))]
    assert not any(hasattr(field, "seed") for field in fields if field.method != "random")


def test_another_method_than_asked_for_is_an_error(service: Any) -> None:
    service.applies = "uniform"
    with pytest.raises(TokenPruneError, match="must apply random"):
        ask_questions(service, QUESTIONS, 0.25, lambda: None)
