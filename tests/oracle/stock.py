"""Answers of stock vLLM: run as a process of its own, without our worker and scheduler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.support import Engine
from tests.oracle.asks import COMPARE, DESCRIBE, TEXT, image

REQUESTS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    (TEXT, (), {"temperature": 0}),
    (DESCRIBE, (1,), {"temperature": 0}),
    (COMPARE, (1, 2), {"temperature": 0}),
    (DESCRIBE, (2,), {"temperature": 0.9, "seed": 11}),
    (DESCRIBE, (3,), {"temperature": 0, "presence_penalty": 0.5, "min_tokens": 4}),
    (TEXT, (), {"temperature": 1.0, "seed": 5, "n": 2}),
]


def answers(engine: Engine) -> list[list[list[Any]]]:
    """Return tokens and the exact log-probs of every sequence, all requests in one batch."""
    from vllm import SamplingParams

    prompts = [
        {"prompt": p, **({"multi_modal_data": {"image": [image(s) for s in i]}} if i else {})}
        for p, i, _ in REQUESTS
    ]
    params = [SamplingParams(max_tokens=12, logprobs=3, **kw) for _, _, kw in REQUESTS]
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    return [
        [
            [list(s.token_ids), [sorted((t, p.logprob) for t, p in x.items()) for x in s.logprobs]]
            for s in output.outputs
        ]
        for output in outputs
    ]


def stock_answers(checkpoint: Path, runner: str) -> list[list[list[Any]]]:
    """Return the same from stock vLLM in another process.

    Args:
        checkpoint: The model.
        runner: `v2` is the runner we build on, through Triton's interpreter; `v1` is what a plain
            `vllm serve` uses on a CPU.
    """
    root = Path(__file__).parents[2]
    # this process runs the V2 runner; the other one decides for itself
    ours = ("PYTHONPATH", "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracle.stock", str(checkpoint), runner],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[2] == "v2":
        from tokenprune.vllm_on_cpu import activate

        activate()
    print(json.dumps(answers(Engine(Path(sys.argv[1]), pruning=False))))
