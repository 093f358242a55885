"""`tokenprune demo`: what pruning does to right answers, to memory and to speed.

Two servers, one after the other: the built-in model answers questions, then a larger model with
random weights is timed. What the figures mean is told in `quiz.py` and `measure.py`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenprune.demo import builtin
from tokenprune.demo.machine import describe_machine
from tokenprune.demo.report import (
    WIDTH,
    changed,
    flops_share,
    kv_pool,
    medians,
    metrics_table,
    results_table,
    verdict,
)
from tokenprune.demo.steps import served, step

# with a prefix cache, questions about one picture would save each other's prefill
_QUIZ_ARGUMENTS = ("--no-enable-prefix-caching", "--max-num-seqs", "8")
_SPEED_ARGUMENTS = (
    "--enforce-eager",
    "--no-enable-prefix-caching",
    # four images are 2304 visual tokens, and transprune scores a prompt in one step
    *("--max-num-batched-tokens", "3072", "--max-model-len", "3072", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
)


def run_demo(arguments: Sequence[str] = ()) -> None:
    """Run the demo and print what was measured.

    Args:
        arguments: The command's options; `--help` lists them.

    Raises:
        TokenPruneError: The built-in model is damaged, or a server did not start or not answer.
        SystemExit: With status 1 where the unpruned model answers too few questions right, or a
            pruned request holds no fewer KV blocks.
    """
    options = _parse(arguments)
    # a plain kill must stop the server too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    answers, answers_good = _compare_answers(console, options.keep_ratio)
    speed, speed_good = _compare_speed(console, options.keep_ratio)
    if options.json is not None:
        record = {
            "command": f"tokenprune demo --keep-ratio {options.keep_ratio:g}",
            "machine": describe_machine(),
            "keep_ratio": options.keep_ratio,
            "answers": answers,
            "speed": speed,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if not (answers_good and speed_good):
        raise SystemExit(1)


def _compare_answers(console: Console, keep_ratio: float) -> tuple[dict[str, Any], bool]:
    """Run and print the first part; return its record, and whether it is as it should be."""
    builtin.model_folder()
    with step(console, "Loading the questions"):
        from tokenprune.demo import quiz
        from tokenprune.demo.checkpoint import cache_dir
        from tokenprune.demo.quiz_report import example, quiz_table, quiz_verdict

        questions = quiz.load_questions()
        flags = builtin.serve_flags()
    console.print(
        "\n[bold]1. Right answers.[/bold] The built-in model, trained on generated pictures, is "
        "asked about pictures it never saw. It is too small for pruning to make it much faster; "
        "the second part is about speed.\n"
    )
    with served(console, None, _QUIZ_ARGUMENTS, cache_dir() / "demo-answers.log") as server:
        with step(console, "Asking", quiz.num_requests(questions)) as advance:
            rows = quiz.ask_questions(server, questions, keep_ratio, advance)
        blocks_total = kv_pool(server.metrics())[1]
    console.print(
        f"\n{len(questions)} questions, {quiz.CONCURRENCY} at a time, keep_ratio {keep_ratio:g}; "
        f"TTFT is the median. KV blocks, of {blocks_total} in the pool, and visual tokens are "
        "those of one prompt with two pictures."
    )
    console.print(quiz_table(rows))
    console.print("The first question that pruning got wrong, or the first of all:")
    console.print("\n".join(example(questions, rows)), markup=False)
    line, is_good = quiz_verdict(rows)
    _print_verdict(console, line, is_good)
    asked = [
        {"family": q.family, "question": q.text, "answer": q.answer, "pictures": q.names}
        for q in questions
    ]
    return {
        "weights": builtin.recorded_sha256(),
        "server_arguments": _QUIZ_ARGUMENTS,
        "model_flags": flags,
        "concurrency": quiz.CONCURRENCY,
        "kv_blocks_total": blocks_total,
        "questions": asked,
        "rows": [{**asdict(row), "ttft_median_seconds": row.ttft_median} for row in rows],
        "verdict": line,
    }, is_good


def _compare_speed(console: Console, keep_ratio: float) -> tuple[dict[str, Any], bool]:
    """Run and print the second part; return its record, and whether it is as it should be."""
    console.print(
        "\n[bold]2. Memory and speed.[/bold] A larger model with random weights: its answers are "
        "nonsense and say nothing about quality.\n"
    )
    with step(console, "Building the model (kept for the next run)"):
        from tokenprune.demo.checkpoint import DEMO, cache_dir, cached_checkpoint

        folder = cached_checkpoint(DEMO)
    with step(console, "Preparing four photographs"):
        from tokenprune.demo import measure

        content = measure.prompt_content(measure.photographs())
        fields = measure.pruning_fields(keep_ratio)
    named = ("--served-model-name", measure.MODEL, "--dtype", builtin.served_dtype())
    arguments = [*_SPEED_ARGUMENTS, *named]
    with served(console, folder, arguments, cache_dir() / "demo-server.log") as server:
        before = server.metrics()
        with step(console, "Asking", measure.NUM_REQUESTS) as advance:
            rows = measure.measure(server, content, fields, advance)
        after = server.metrics()
    changes, blocks_total = changed(before, after), kv_pool(after)[1]
    console.print(
        f"\nOne prompt with four photographs, {measure.NUM_OUTPUT_TOKENS} output tokens, "
        f"keep_ratio {keep_ratio:g}. Per method one request for the KV blocks, of {blocks_total} "
        f"in the pool, and {len(rows[0].ttft_seconds)} for the times (medians). No prefix cache; "
        "image features cached for all methods alike."
    )
    console.print(results_table(rows))
    console.print("What changed on /metrics:")
    console.print(metrics_table(changes))
    line, is_good = verdict(rows, flops_share(changes))
    _print_verdict(console, line, is_good)
    return {
        "model": asdict(DEMO),
        "server_arguments": arguments,
        "output_tokens": measure.NUM_OUTPUT_TOKENS,
        "kv_blocks_total": blocks_total,
        "rows": [{**asdict(row), **medians(row)} for row in rows],
        "changes": changes,
        "verdict": line,
    }, is_good


def _print_verdict(console: Console, line: str, is_good: bool) -> None:
    console.print(f"\n[bold]{line}[/bold]" if is_good else f"\n[bold red]{line}[/bold red]")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tokenprune demo", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--keep-ratio",
        type=_keep_ratio,
        default=0.125,
        help="share of the visual tokens that survives the last cut, in (0, 1); default 0.125",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures in FILE")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"the folder of --json must exist, got {options.json}")
    return options


def _keep_ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1), got {text!r}")
    return value
