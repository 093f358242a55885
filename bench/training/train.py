"""Train the demo model: seeded, in parts, on a CPU or a GPU.

    python -m bench.training [--hours 8] [--steps N] [--device cpu|cuda] [--state FOLDER]
    python -m bench.training --evaluate [--split test]

A run writes its state every few minutes and when it is interrupted; the same command goes on from
there, to the same weights as without the interruption. `log.jsonl` beside the state has a line for
every fifty steps.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.training import state
from bench.training.evaluate import evaluate
from bench.training.model import ModelSpec
from bench.training.recipe import Recipe, make_batches, windows
from bench.training.trainer import Trainer

SAVE_SECONDS = 180
CPU_RECIPE = Recipe(half=True)
GPU_RECIPE = Recipe(
    half=True,
    tower_size=128,
    tower_steps=2000,
    picture_tokens=60_000,
    text_tokens=60_000,
    steps=10_000,
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench.training", description=__doc__.split("\n")[0])
    parser.add_argument("--state", type=Path, default=Path(".demo_model"), help="folder to keep")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hours", type=float, help="stop and save after this time")
    parser.add_argument("--stop-at", type=int, help="stop and save after this step of both phases")
    parser.add_argument("--evaluate", action="store_true", help="only measure what is there")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--contexts", type=int, default=200, help="pictures and documents to ask")
    parser.add_argument("--picture-level", type=int)
    parser.add_argument("--text-level", type=int)
    parser.add_argument(
        "--change-recipe", action="store_true", help="resume although recipe options differ"
    )
    parser.add_argument("--workers", type=int, help="processes that make data; 0 for none")
    for kind, described in ((Recipe, "recipe"), (ModelSpec, "model")):
        group = parser.add_argument_group(described, "what a run begins with and keeps")
        for field in dataclasses.fields(kind):
            flag = f"--{field.name.replace('_', '-')}"
            if kind is ModelSpec and field.name == "seed":
                continue
            if isinstance(field.default, bool):
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
            else:
                group.add_argument(flag, type=type(field.default))
    return parser.parse_args(arguments)


def _with(base: Any, args: argparse.Namespace) -> Any:
    names = [field.name for field in dataclasses.fields(base)]
    given = {name: getattr(args, name, None) for name in names}
    return dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None})


def open_trainer(args: argparse.Namespace) -> Trainer:
    """Return a trainer where the folder's run stands, or a fresh one."""
    saved = state.load_state(args.state)
    if saved is None:
        base, spec = (GPU_RECIPE if args.device.startswith("cuda") else CPU_RECIPE), ModelSpec()
    else:
        base, spec = Recipe(**saved["recipe"]), ModelSpec(**saved["spec"])
    recipe, spec = _with(base, args), _with(spec, args)
    trainer = Trainer(recipe, dataclasses.replace(spec, seed=recipe.seed), args.device)
    if saved is not None:
        trainer.load_state_dict(saved, change_recipe=args.change_recipe)
    return trainer


class Log:
    """The run's JSONL file, cut back to the step that is gone on from."""

    def __init__(self, path: Path, step: int):
        self._path = path
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            scratch = path.with_suffix(".part")
            scratch.write_text("".join(f"{line}\n" for line in kept))
            os.replace(scratch, path)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step."""
    seen: list[int] = []
    former = {
        number: signal.signal(number, lambda received, _: seen.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield seen
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def batch_maker(workers: int) -> Iterator[Any]:
    """Yield a function that maps plans to batches in order, in this or in other processes."""
    if workers == 0:
        yield lambda plans: map(make_batches, plans)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _ignore_signals) as pool:
        yield lambda plans: pool.imap(make_batches, plans)


def train(trainer: Trainer, args: argparse.Namespace, console: Console) -> None:
    """Run until the last step, the time limit or a signal, and leave a state behind."""
    last = min(trainer.last_step, args.stop_at or trainer.last_step)
    deadline = time.monotonic() + args.hours * 3600 if args.hours else None
    workers = args.workers
    if workers is None:
        workers = 0 if args.device == "cpu" else max(1, min(12, (os.cpu_count() or 2) - 2))
    state.prepare(args.state)
    log, saved_at = Log(args.state / "log.jsonl", trainer.step), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[news]}"))
    progress.console.file = sys.stderr
    with stop_signals() as signals, batch_maker(workers) as make, progress:
        task = progress.add_task(trainer.phase, completed=trainer.step, total=last, news="")

        def must_stop() -> bool:
            return bool(signals) or (deadline is not None and time.monotonic() > deadline)

        for steps in windows(trainer.step, last):
            for batches in make(trainer.plan(steps)):
                started = time.monotonic()
                trainer.train_step(batches)
                trainer.seconds += time.monotonic() - started
                progress.update(task, completed=trainer.step, description=trainer.phase)
                if must_stop():
                    break
            if trainer.step % 50 == 0:
                line = trainer.end_window()
                log.add(line)
                progress.update(task, news=_news(line))
            if must_stop():
                break
            if time.monotonic() - saved_at > SAVE_SECONDS:
                state.save_state(args.state, trainer.state_dict())
                saved_at = time.monotonic()
    state.save_state(args.state, trainer.state_dict())
    console.print(f"saved step {trainer.step} of {trainer.last_step} in {args.state}")


def _news(line: dict[str, Any]) -> str:
    accuracy = " ".join(f"{k} {v:.0%}" for k, v in line["accuracy"].items())
    return accuracy or f"patch digits {line.get('patch_digit', 0):.0%}"


def show(result: dict[str, Any], console: Console) -> None:
    """Print an evaluation."""
    levels = f"picture level {result['picture_level']}, text level {result['text_level']}"
    table = Table("family", "accuracy", "questions", title=f"{result['split']}, {levels}")
    for family, row in result["families"].items():
        table.add_row(family, f"{row['accuracy']:.1%}", str(row["questions"]))
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    args, console = parse(arguments), Console()
    try:
        if args.evaluate and not state.state_path(args.state).exists():
            raise state.StateError(f"no training state in {args.state}; train one, or name --state")
        trainer = open_trainer(args)
        if args.evaluate:
            result = evaluate(
                trainer,
                split=args.split,
                contexts=args.contexts,
                picture_level=args.picture_level,
                text_level=args.text_level,
            )
            (args.state / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
            show(result, console)
        else:
            train(trainer, args, console)
    except state.StateError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
