"""Time the operators against their torch references, on the shapes of real models.

    python -m bench.ops [--op NAME] [--dtype bf16] [--rounds 50] [--out FILE]

A case whose result is wrong prints WRONG and no time. Without a GPU the kernels are checked in
Triton's interpreter on tiny sizes, and only the torch form is timed, at full size. On a GPU each
call starts with a cold L2 cache and includes its waits for the device. GB/s counts each input
once, or what is moved; the roof is a copy measured in the same run.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.common import manifest, quantiles
from bench.ops.cases import BENCHES, SEED, Draw, call_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return p10, p50 and p90 of every call in ms; the order rotates from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE) if DEVICE == "cuda" else None
    for i in range(-3, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            elapsed = time_once(calls[name], flush)
            if i >= 0:
                samples[name].append(elapsed)
    return {name: quantiles(x) for name, x in samples.items()}


def time_once(call: Callable[[], Any], flush: torch.Tensor | None) -> float:
    """Return the milliseconds of one call; writing to `flush` empties the L2 cache before it."""
    if flush is None:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth() -> float:
    """Return the GB/s of a large copy, reads and writes together."""
    source = torch.zeros(1 << (30 if DEVICE == "cuda" else 27), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    p50 = measure({"copy": lambda: target.copy_(source)}, 10)["copy"][1]
    return 2 * source.numel() / p50 / 1e6


def run_case(op: str, case: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Check one case and time it: `right`, and if it is, times by form and the bytes moved."""
    checked = call_of(op, case, Draw(DEVICE, dtype), is_tiny=DEVICE == "cpu")
    if not checked.is_right():
        return {"right": False}
    call = call_of(op, case, Draw(DEVICE, dtype))
    forms = ("triton", "torch") if DEVICE == "cuda" else ("torch",)
    times = measure({form: call.bound(form) for form in forms}, rounds)
    return {"right": True, "bytes": call.num_bytes, "p10_p50_p90_ms": times}


def show(title: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]], roof: float) -> Table:
    """Return the table of all cases by operator, at most 80 columns wide."""
    table = Table("case", "form", title=title, box=None)
    for heading in ("p10", "p50", "p90", "GB/s", "roof"):
        table.add_column(heading, justify="right")
    for op, cases in found.items():
        table.add_row(op)
        for case, line in cases.items():
            if not line["right"]:
                table.add_row(f"  {case}", "triton", "WRONG")
                continue
            for form, points in line["p10_p50_p90_ms"].items():
                rate = line["bytes"] / points[1] / 1e6
                columns = [*(f"{x:.3f}" for x in points), f"{rate:.3g}", f"{rate / roof:.0%}"]
                table.add_row(f"  {case}", form, *columns)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases that the command line names; return 1 if one of them is wrong."""
    parser = argparse.ArgumentParser(prog="bench.ops")
    parser.add_argument("--op", choices=BENCHES)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, help="append one JSON line per case")
    options = parser.parse_args(arguments)
    if DEVICE == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")

    run, roof = manifest("bench.ops", SEED), copy_bandwidth()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for op in [options.op] if options.op else BENCHES:
        for case in BENCHES[op].sizes:
            line = run_case(op, case, DTYPES[options.dtype], options.rounds)
            found.setdefault(op, {})[case] = line
            if options.out:
                with options.out.open("a") as file:
                    names = {"op": op, "case": case, "dtype": options.dtype}
                    print(json.dumps(run | names | {"roof_gb_per_s": roof} | line), file=file)
    device = run["machine"]["gpu"] or "cpu"
    title = f"{device}, {options.dtype}, times in ms, copy {roof:.0f} GB/s"
    Console(width=80).print(show(title, found, roof))
    return 0 if all(x["right"] for cases in found.values() for x in cases.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
