"""Time the scoring kernels against their torch references, on the shapes of real models.

    python -m bench.bench_kernels [--op NAME] [--dtype bf16] [--rounds 50] [--out FILE]

A case whose result is wrong prints WRONG and no time. Without a GPU the kernels are checked in
Triton's interpreter on fewer rows, and only the torch form is timed, at full size. On a GPU each
call starts with a cold L2 cache and includes its wait for the number of visual tokens. GB/s
counts each input once; the roof is a copy measured in the same run.
"""

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.common import manifest, quantiles
from tokenprune import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEED, TEXT_ROWS, HEAD_DIM = 20, 48, 128
# n, d, hq, hkv
MODELS = {
    "llava-1.5-7b": (640, 4096, 32, 32),
    "llava-next-7b": (2944, 4096, 32, 32),
    "qwen2-7b": (1280, 3584, 28, 4),
    "qwen3-8b": (1280, 4096, 32, 8),
}
OPS = ("transition_scores", "instruction_attention", "lag_scores")
LAG = 128


def make_inputs(op, dtype, n, d, hq, hkv):
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    position = torch.arange(n, device=DEVICE)
    visual = (position >= 16) & (position < n - TEXT_ROWS)
    if op == "lag_scores":
        tokens = max(2, n // LAG) * LAG
        keys, values = normal(hkv, tokens, HEAD_DIM), normal(hkv, tokens, HEAD_DIM)
        return (keys, values), {"sink": 0, "lag": LAG}
    if op == "transition_scores":
        return (normal(n, d), normal(n, d), visual), {"scope": "all"}
    q, k = normal(hq, TEXT_ROWS, HEAD_DIM), normal(hkv, n, HEAD_DIM)
    return (q, k, position[-TEXT_ROWS:], visual), {"scale": HEAD_DIM**-0.5}


def is_right(op, tensors, options):
    actual = getattr(kernels, op)(*tensors, backend="triton", **options)
    exact = [x.double() if x.is_floating_point() else x for x in tensors]
    expected = getattr(kernels, f"{op}_reference")(*exact, **options).float()
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-7)


def measure(calls, rounds):
    """Return p10, p50 and p90 of every call in ms; the order rotates from round to round."""
    samples, names = {name: [] for name in calls}, list(calls)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE) if DEVICE == "cuda" else None
    for i in range(-3, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            elapsed = time_once(calls[name], flush)
            if i >= 0:
                samples[name].append(elapsed)
    return {name: quantiles(x) for name, x in samples.items()}


def time_once(call, flush):
    if flush is None:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth():
    """Return the GB/s of a large copy, reads and writes together."""
    source = torch.zeros(1 << (30 if DEVICE == "cuda" else 27), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    p50 = measure({"copy": lambda: target.copy_(source)}, 10)["copy"][1]
    return 2 * source.numel() / p50 / 1e6


def main():
    parser = argparse.ArgumentParser(prog="bench.bench_kernels")
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, help="append one JSON line per case")
    arguments = parser.parse_args()
    if DEVICE == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")

    run, roof, all_right = manifest("bench.bench_kernels", SEED), copy_bandwidth(), True
    device = run["machine"]["gpu"] or "cpu"
    title = f"{device}, {arguments.dtype}, times in ms, copy {roof:.0f} GB/s"
    table = Table("op", "case", "form", "p10", "p50", "p90", "GB/s", "roof", title=title, box=None)
    for op in [arguments.op] if arguments.op else OPS:
        for model, (n, *widths) in MODELS.items():
            dtype = DTYPES[arguments.dtype]
            tensors, options = make_inputs(op, dtype, n, *widths)
            checked = make_inputs(op, dtype, n if DEVICE == "cuda" else 150, *widths)
            all_right &= (right := is_right(op, *checked))
            line = run | {"op": op, "case": model, "dtype": arguments.dtype, "right": right}
            if not right:
                table.add_row(op.split("_")[0], model, "triton", "WRONG")
            else:
                forms = ("triton", "torch") if DEVICE == "cuda" else ("torch",)
                call = partial(getattr(kernels, op), *tensors, **options)
                times = measure({x: partial(call, backend=x) for x in forms}, arguments.rounds)
                line |= {"roof_gb_per_s": roof, "p10_p50_p90_ms": times}
                for form, points in times.items():
                    rate = sum(x.nbytes for x in tensors) / points[1] / 1e6
                    columns = [*(f"{x:.3f}" for x in points), f"{rate:.3g}", f"{rate / roof:.0%}"]
                    table.add_row(op.split("_")[0], model, form, *columns)
            if arguments.out:
                with arguments.out.open("a") as file:
                    print(json.dumps(line), file=file)
    Console(width=80).print(table)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
