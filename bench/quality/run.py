"""Measure what pruning costs in accuracy: task x method x keep ratio, through the served engine.

    python -m bench.quality [--model DIR] [-n 500] [--out DIR] [--quick] [--record]

Without --model it is the built-in model, as in `make quality`, which then updates the pages.
Held-out questions of `bench/tasks` go to `tokenprune serve` over the OpenAI API, greedy and
several at a time; an answer counts if it matches exactly. `off`, `random` and `uniform` are in
every table. A sample of each cell is answered again by a transformers loop that drops the same
rows. An interrupted run goes on where it stopped, from answers.jsonl in the output folder; without
--out, each axis of pruning has a folder of its own.
--quick asks fewer questions, keeps no answers unless --out is given, and fails where the
unpruned model is worse than accuracy.json beside the weights says. Words after `--` go to
`tokenprune serve`.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bench.quality import report as quality_report
from bench.quality.cells import AXES, HF_AXES, OFF, Cell, all_methods, make_cells
from bench.quality.gate import (
    GATE_POINTS,
    QUICK_N,
    RECORD,
    add_served,
    drops,
    expected,
    levels_of,
    read_record,
)
from bench.quality.output import summarize, write_results
from bench.quality.serve import ask_server, bar, server_arguments
from bench.quality.store import HF, SERVED, Answers, code_hash, model_hash
from bench.tasks.data import LEVELS
from bench.tasks.held_out import TASKS, Item, Levels, item, tasks_at
from tokenprune.demo.builtin import FOLDER
from tokenprune.errors import TokenPruneError
from tokenprune.installation import install_command

DEFAULT_OUT = Path("bench/results/quality")
# the gate is about the unpruned model; a few pruned questions show that pruning runs
QUICK_RATIOS, QUICK_HF = (0.25,), 1

Work = list[tuple[Cell, Item]]


def check_with_hf(model: Path, work: Work, answers: Answers, console: Console) -> None:
    from bench.quality.hf import Checker

    checker = Checker(model, answers.runs[-1]["engine"])
    with bar(console, "transformers", len(work)) as advance:
        for cell, asked in work:
            checker.check(cell, asked, answers)
            advance(cell)


def questions_of(options: argparse.Namespace, cell: Cell) -> int:
    """Return how many questions are asked in a cell."""
    axis, unpruned = AXES[cell.axis], cell.method == OFF
    if options.quick:
        return options.n or QUICK_N if unpruned else axis.quick_n
    return options.n or (axis.n if unpruned else axis.pruned_n)


def measure(options: argparse.Namespace, console: Console, out: Path, axes: Sequence[str]) -> int:
    model = model_hash(options.model)
    if find_spec("matplotlib") is None:
        # before an hour of questions, not after it
        raise TokenPruneError(
            f"matplotlib must be installed for the picture, got none; {install_command('quality')}"
        )
    record = read_record(options.model)
    reached = levels_of(record)
    levels = Levels(
        reached.picture if options.picture_level is None else options.picture_level,
        reached.text if options.text_level is None else options.text_level,
    )
    shown = options.tasks or tasks_at(levels)
    cells = make_cells(shown, options.methods, options.keep_ratios, axes)
    if not cells:
        return 0
    most = {cell: questions_of(options, cell) for cell in cells}
    n = max(most.values())
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    recorded: dict[str, float] = {}
    if options.quick:
        # a missing record is told now, not after all questions
        recorded = expected(record, model, options.seed, levels, n)
    serving = server_arguments(options.model, options.serve)
    header: dict[str, Any] = {"model": model, "seed": options.seed, "server": serving}
    with Answers(out / "answers.jsonl", {**header, "code": code_hash()}) as answers:
        questions = {
            name: [item(name, index, options.seed, levels) for index in range(n)] for name in tasks
        }
        asked = {cell: questions[cell.task][: most[cell]] for cell in cells}

        def missing(by: str, most: int) -> Work:
            pairs = [(cell, one) for cell, items in asked.items() for one in items[:most]]
            return [(c, i) for c, i in pairs if answers.get(c, i.index, by, i.digest) is None]

        if work := missing(SERVED, n):
            ask_server(
                *(options.model, serving, work, answers),
                seed=options.seed,
                concurrency=options.concurrency,
                console=console,
            )
        work = [
            (c, i)
            for c, i in missing(HF, options.hf)
            if c.method == OFF or set(c.pruning(0)) <= {*HF_AXES}
        ]
        if work:
            check_with_hf(options.model, work, answers, console)
        rows = quality_report.make_rows(asked, answers)
        summary = summarize(
            model=model,
            seed=options.seed,
            n=n,
            pruned_n=sorted({most[cell] for cell in cells if cell.method != OFF}),
            levels=levels,
            axes=axes,
            runs=answers.runs,
        )
        shown = write_results(out, quality_report.with_pools(rows), summary)
        console.print(shown, markup=False, soft_wrap=True)
        if options.record:
            first = [
                quality_report.make_row(c, questions[c.task][:QUICK_N], answers)
                for c in cells
                if c.method == OFF
            ]
            add_served(options.model, record, model, options.seed, levels, rows, first)
    failures = drops(rows, recorded) if options.quick else []
    for line in failures:
        console.print(f"[red]{escape(line)}[/red]", soft_wrap=True)
    if options.quick and not failures:
        console.print(f"No task lost more than {GATE_POINTS:g} points unpruned.")
    return 1 if failures else 0


def _listed(ratios: Sequence[float]) -> str:
    return ",".join(f"{ratio:g}" for ratio in ratios)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _axes(text: str) -> list[str]:
    names = _names(text)
    if wrong := [name for name in names if name not in AXES]:
        raise argparse.ArgumentTypeError(f"must be among {', '.join(AXES)}, got {wrong[0]}")
    return names


def _ratios(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench.quality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    ratios = "; ".join(f"{name} {_listed(axis.keep_ratios)}" for name, axis in AXES.items())
    numbers = "; ".join(f"{name} {axis.n}, pruned {axis.pruned_n}" for name, axis in AXES.items())
    add("--model", type=Path, default=FOLDER, help="folder of the checkpoint; default: built-in")
    add("--tasks", type=_names, help=f"default: all at the level of {','.join(TASKS)}")
    add("--axes", type=_axes, default=list(AXES), help=f"default: {','.join(AXES)}")
    add("--methods", type=_names, help="where a task's axis has them; default: all there are")
    add("--keep-ratios", type=_ratios, help=f"default: {ratios}")
    add("-n", type=_positive, help=f"questions a cell; default: {numbers}")
    add("--hf", type=int, help="of those, checked by transformers, default 20")
    add("--concurrency", type=_positive, default=16, help="requests at a time")
    add("--seed", type=int, default=0, help="of the questions")
    reached = "difficulty; default: what training reached"
    add("--picture-level", type=int, choices=range(LEVELS["picture"]), help=reached)
    add("--text-level", type=int, choices=range(LEVELS["text"]), help=reached)
    add("--out", type=Path, help=f"default: a folder per axis in {DEFAULT_OUT}")
    add("--fresh", action="store_true", help="forget the answers in --out")
    add("--quick", action="store_true", help="few questions, none remembered; for CI")
    add("--record", action="store_true", help=f"write {RECORD} beside the weights")
    ours = list(arguments)
    cut = ours.index("--") if "--" in ours else len(ours)
    options = parser.parse_args(ours[:cut])
    options.serve = ours[cut + 1 :]
    quick = options.quick
    # calibrated presets fit no other model
    usual = [m for m in all_methods() if options.model == FOLDER or m != "vflowopt-cal"]
    options.methods = options.methods or usual
    options.hf = (QUICK_HF if quick else 20) if options.hf is None else options.hf
    options.keep_ratios = options.keep_ratios or (QUICK_RATIOS if quick else None)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    # a plain kill must stop the server too. asyncio ends its tasks in order on an interrupt only,
    # which background jobs of a shell ignore unless told otherwise
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    console = Console(highlight=False)
    try:
        if options.quick and options.out is None:
            # answers of older code would hide what the newest broke
            with tempfile.TemporaryDirectory() as folder:
                return measure(options, console, Path(folder), options.axes)
        if options.out is not None:
            runs = {options.out: options.axes}
        else:
            runs = {DEFAULT_OUT / axis: [axis] for axis in options.axes}
        status = 0
        for out, axes in runs.items():
            if options.fresh:
                (out / "answers.jsonl").unlink(missing_ok=True)
            status = max(status, measure(options, console, out, axes))
        return status
    except TokenPruneError as error:
        console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("Interrupted; without --quick the same command goes on from here.")
        return 130
