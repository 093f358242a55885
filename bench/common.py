"""What every benchmark records about its run, and how all of them report and write results."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenprune.demo.machine import describe_machine

_PACKAGES = ("triton", "numpy")


def manifest(module: str, seed: int) -> dict[str, Any]:
    """Return commit, command, seed and machine, without names or paths of this machine."""
    machine = describe_machine()
    for package in _PACKAGES:
        try:
            machine["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    sha = _git("rev-parse", "--verify", "-q", "HEAD")
    return {
        "git_sha": sha,
        "git_dirty": bool(_git("status", "--porcelain")) if sha else None,
        "command": command_line(module, sys.argv[1:]),
        "seed": seed,
        "machine": machine,
    }


def command_line(module: str, arguments: Sequence[str]) -> str:
    """Return the command that repeats a run; where its result went does not matter."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--out":
            next(rest, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return " ".join(["python -m", module, *kept])


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that reads as plain text too; the first line has the headings."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def quantiles(values: Iterable[float]) -> list[float]:
    """Return p10, p50 and p90, interpolated between neighbours."""
    ordered = sorted(values)
    return [_quantile(ordered, share) for share in (0.1, 0.5, 0.9)]


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one rename, so nobody sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(content.encode() if isinstance(content, str) else content)
    scratch.replace(path)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(("git", *words), capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
