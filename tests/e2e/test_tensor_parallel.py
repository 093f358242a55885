"""Two ranks hold half of the heads each, and still choose the same rows as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.support import Engine
from tests.oracle.asks import DESCRIBE, Answer, Ask, visual

pytestmark = pytest.mark.vllm

MARK = "answers: "
ASKS = [
    Ask(DESCRIBE, (1,)),
    Ask(DESCRIBE, (1,), visual("uniform")),
    Ask(DESCRIBE, (2,), visual("transprune", 0.125)),
    Ask(DESCRIBE, (3,), visual("transprune", 0.3, form="paper")),
    Ask(DESCRIBE, (4,), visual("vflowopt", 0.3, threshold=1.5)),
]


@pytest.mark.proves("tensor parallel", "visual/uniform", "transprune", "vflowopt")
def test_two_ranks_answer_like_one(engine: Engine, checkpoint: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.test_tensor_parallel", str(checkpoint)],
        cwd=root,
        # one core a rank; by default each rank would take all of them
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    )
    # workers log to the same stream
    (line,) = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
    for ask, (tokens, logprobs) in zip(ASKS, json.loads(line.removeprefix(MARK)), strict=True):
        (alone,) = engine.ask(ask)
        two = Answer(tokens, [{int(t): p for t, p in step.items()} for step in logprobs])
        assert two.agrees_with(alone), ask


if __name__ == "__main__":
    two_ranks = Engine(Path(sys.argv[1]), tensor_parallel_size=2)
    print(MARK + json.dumps([[a.tokens, a.logprobs] for a in two_ranks.ask(*ASKS)]))
