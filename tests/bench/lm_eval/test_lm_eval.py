"""lm-eval as its page says: the very commands, against `tokenprune serve`, without a network."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.lm_eval import make_data
from bench.tasks.held_out import is_right
from tokenprune.demo.local_server import LocalServer

pytestmark = pytest.mark.vllm

FOLDER = Path(make_data.__file__).parent
PAGE = (FOLDER / "README.md").read_text()
QUESTIONS, LIMIT = 14, 11
SECONDS = 300


@dataclass
class Run:
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    metrics: dict[tuple[str, frozenset[str]], float]


def command_of(task: str) -> list[str]:
    """Return the command that the page gives for a task."""
    (found,) = (c for c in re.findall(r"```\n(lm_eval run .*?)```", PAGE, re.DOTALL) if task in c)
    return shlex.split(found.replace("\\\n", " "))


def start(task: str, url: str, folder: Path) -> subprocess.Popen[bytes]:
    words = [word.replace("http://127.0.0.1:8000", url) for word in command_of(task)]
    assert any(url in word for word in words)
    more = ["--limit", str(LIMIT), "--log_samples", "--output_path", str(folder / task)]
    # a download must fail, and a proxy does not know our loopback
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "NO_PROXY": "*"}
    with (folder / f"{task}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lm_eval", *words[1:], *more],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("lm_eval")
    shutil.copytree(FOLDER, folder / "bench" / "lm_eval")
    out = ["--out", str(folder / make_data.FOLDER), "-n", str(QUESTIONS), "--text-level", "0"]
    assert make_data.main(out) == 0
    with LocalServer(None, [], folder / "server.log") as server:
        server.wait_until_ready()
        tasks = ("tokenprune_pictures", "tokenprune_documents")
        # both at once: most of their time they import
        running = {task: start(task, server.url, folder) for task in tasks}
        try:
            statuses = {task: process.wait(SECONDS) for task, process in running.items()}
        finally:
            for process in running.values():
                process.kill()
        for task, status in statuses.items():
            assert status == 0, (folder / f"{task}.log").read_text(errors="replace")[-3000:]
        # an answer younger than this may be missing from the page
        time.sleep(1)
        page = server.metrics()
        metrics = {
            (name, frozenset(dict(labels).values())): v for (name, labels), v in page.items()
        }
    results, samples = {}, {}
    for task in tasks:
        (file,) = (folder / task).rglob("results_*.json")
        results |= json.loads(file.read_text())["results"]
        (file,) = (folder / task).rglob("samples_*.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return Run(results, samples, metrics)


@pytest.mark.parametrize("task", ["tokenprune_pictures", "tokenprune_documents"])
def test_the_score_is_the_share_of_right_answers(task: str, run: Run) -> None:
    samples = run.samples[task]
    assert len(samples) == LIMIT
    right = [is_right(s["resps"][0][0], s["doc"]["answer"]) for s in samples]
    assert run.results[task]["exact_match,strip"] == pytest.approx(sum(right) / LIMIT)
    assert any(right), "the built-in model knows some answers"


def test_pruning_was_applied_to_pictures_and_to_nothing_else(run: Run) -> None:
    asked = {
        labels: value
        for (name, labels), value in run.metrics.items()
        if name == "tokenprune_requests_total" and value
    }
    pruned, off = {"transprune", "none", "applied"}, {"none", "off"}
    assert asked == {frozenset(pruned): LIMIT, frozenset(off): LIMIT}


def test_both_pictures_of_a_pair_reach_the_model(run: Run) -> None:
    shown = [len(sample["doc"]["pictures"]) for sample in run.samples["tokenprune_pictures"]]
    assert set(shown) == {1, 2}
    seen = run.metrics["tokenprune_visual_tokens_total", frozenset({"transprune", "seen"})]
    assert seen == 144 * sum(shown)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_page_has_a_command_for_each_task(file: Path) -> None:
    words = command_of(file.stem)
    assert words[words.index("--tasks") + 1] == file.stem
