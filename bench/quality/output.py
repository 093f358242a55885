"""The files of a run: table, figures, pictures, and the summary that seals them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from bench.common import write_whole
from bench.quality.cells import KV_PARAMETERS
from bench.quality.report import Row, csv_text, markdown, read_csv, verdict
from bench.tasks.data import PICTURE_LEVELS, TEXT_LEVELS
from bench.tasks.held_out import Levels
from tokenprune.errors import TokenPruneError

TABLE, FIGURES, SUMMARY = "quality.md", "quality.csv", "quality.json"
_AGAIN = "measure again with: make quality"


def picture_name(axis: str, ending: str = "png") -> str:
    """Return the file name of an axis' Pareto picture."""
    return f"quality-{axis}.{ending}"


def summarize(
    *,
    model: str,
    seed: int,
    n: int,
    pruned_n: Sequence[int],
    levels: Levels,
    axes: Sequence[str],
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what the rows alone do not say."""
    return {
        "model": model,
        "seed": seed,
        "n": n,
        "pruned_n": list(pruned_n),
        "axes": list(axes),
        "picture_level": levels.picture,
        "text_level": levels.text,
        "runs": list(runs),
    }


def facts(summary: Mapping[str, Any]) -> str:
    """Say in words what was asked and what the columns mean."""
    commits = dict.fromkeys(
        f"{run['git_sha']}"[:7] + (" with changes" if run.get("git_dirty") else "")
        for run in summary["runs"]
    )
    few = " to ".join(str(n) for n in summary["pruned_n"])
    pictures = PICTURE_LEVELS[summary["picture_level"]]
    kv = ", ".join(f"{key} {value}" for key, value in KV_PARAMETERS.items())
    documents = f"documents of up to {TEXT_LEVELS[summary['text_level']].tokens} tokens"
    about = {
        "visual": f"up to {pictures.most} things a picture",
        "kv": f"{documents}, KV methods with {kv}",
        "channels": f"{documents}, lagkv with keep_ratio 0.5, {kv}",
    }
    return (
        f"{summary['n']} held-out questions a cell"
        + (f", {few} where pruned" if few not in ("", str(summary["n"])) else "")
        + f", greedy answers; {', '.join(about[axis] for axis in summary['axes'])}. "
        f"Model {summary['model'][:12]}, seed {summary['seed']}, commit {', '.join(commits)}. "
        "*tokens*: kept of seen, mean over layers and prompts. *right*: exact matches, with 95 % "
        "Wilson intervals. *HF*: sampled answers that equal those of a transformers loop which "
        "drops the same rows."
    )


def write_results(out: Path, rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    """Write all files; return the table and what it says in words.

    The summary comes last and holds the hash of the figures, so a run that stops in between
    leaves nothing that passes for whole.
    """
    from bench.quality.plot import draw, pareto

    table, words = markdown(rows), verdict(rows)
    notes = "\n\n".join(
        fill(line, 79) for text in (facts(summary), words) for line in text.splitlines()
    )
    figures = csv_text(rows)
    write_whole(out / FIGURES, figures)
    write_whole(out / TABLE, f"{table}\n{notes}\n")
    for axis in dict.fromkeys(row.axis for row in rows):
        if panels := pareto(rows, axis):
            for ending, content in draw(panels, axis).items():
                write_whole(out / picture_name(axis, ending), content)
    sealed = {**summary, "csv_sha256": _digest(figures)}
    write_whole(out / SUMMARY, json.dumps(sealed, indent=1) + "\n")
    return f"{table}\n{words}"


def read_results(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows and the summary of a run.

    Raises:
        TokenPruneError: A file is missing, damaged, or of another run than its neighbour.
    """
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
        figures = (folder / FIGURES).read_text()
        sealed = summary["csv_sha256"]
        rows = read_csv(figures)
    except FileNotFoundError as error:
        raise TokenPruneError(
            f"the results must hold {error.filename}, got no such file; {_AGAIN}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise TokenPruneError(
            f"the results in {folder} must be whole, got {error!r}; {_AGAIN}"
        ) from None
    if _digest(figures) != sealed:
        raise TokenPruneError(
            f"{folder / FIGURES} must be the figures that {SUMMARY} was written with, "
            f"got others; {_AGAIN}"
        )
    return rows, summary


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
