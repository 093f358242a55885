"""Serve image questions with and without pruning, and beside plain vLLM, at rising concurrency.

    python -m bench.serving [--quick] [--concurrency 1,2,4,8,16,32] [--requests N]
        [--variants off,transprune,uniform] [--no-baseline] [--rounds 3] [--out FILE]

Variants of one round take turns and the order rotates: `stock` is vLLM's own server in a process
of its own, `off` is ours asked for nothing, `mixed` prunes every other request, and the others
prune all of them to `--keep-ratio`. Two servers are never under load at once. In timed rounds no
picture and no text is sent twice to a server, so no cache helps anyone.

A first check refuses figures (WRONG): off must give stock's greedy tokens, a method that keeps
everything must give off's, and every answer must say that its method was applied. An untimed
round reads the peak of the KV cache, since reading takes time from the engine. Preemptions are
vLLM's count over all rounds, that one too. The load is a closed loop: as many requests as
`concurrency` in flight until `--requests` are answered. Ratios pair
the rounds and their median is shown. With --out, one JSON line per cell holds every sample.
"""

import argparse
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.common import manifest
from bench.serving.load import MODEL, StockServer, preemptions, questions, run_burst
from bench.serving.report import cells_table, ratios, summary, verdicts
from tokenprune.demo.checkpoint import CheckpointSpec, cached_checkpoint
from tokenprune.demo.local_server import LocalServer
from tokenprune.demo.report import kv_pool
from tokenprune.policies import methods

METHODS = tuple(methods("visual"))
VARIANTS = ("off", "mixed", *METHODS)
SEED, NUM_CHECKS = 20, 6
# 576 visual tokens an image; small, so that a run fits some minutes of two CPU cores
SPEC = CheckpointSpec(
    layers=8,
    hidden=256,
    image_size=336,
    patch_size=14,
    vision_layers=4,
    vision_hidden=128,
    vision_heads=4,
)


def server_arguments(options):
    return [
        *("--served-model-name", MODEL, "--dtype", options.dtype, "--enforce-eager"),
        *("--max-num-batched-tokens", "2048", "--max-model-len", "2048"),
        *("--max-num-seqs", str(max(options.concurrency))),
        *("--kv-cache-memory-bytes", str(options.kv_mib << 20)),
    ]


def fields_of(variant, keep_ratio):
    """Return the `pruning` fields that the variant's requests take in turn."""
    if variant in METHODS:
        return [{"visual": {"method": variant, "keep_ratio": keep_ratio}}]
    return [None, *fields_of("transprune", keep_ratio)] if variant == "mixed" else [None]


def refcheck(servers, variants, prompts, num_tokens):
    """Return the variants that give wrong tokens for `prompts`, one request at a time."""
    prompts = list(islice(prompts, NUM_CHECKS))

    def tokens(variant, field):
        burst = run_burst(servers[variant], prompts, [field] * len(prompts), 1, num_tokens)
        return [answer.tokens for answer in burst.answers]

    off = tokens("off", None)
    wrong = {"off"} if "stock" in variants and tokens("stock", None) != off else set()
    for variant in variants:
        keep_all = fields_of(variant, 1)[-1]
        if keep_all is not None and tokens(variant, keep_all) != off:
            wrong.add(variant)
    # a ratio to a wrong answer says nothing
    return set(variants) if "off" in wrong else wrong


def measure(server, variant, concurrency, options, prompts, *, timed):
    """Return one burst, and whether every answer says that it was pruned as asked."""
    count = options.requests or max(8, 2 * concurrency if timed else concurrency)
    fields = list(islice(cycle(fields_of(variant, options.keep_ratio)), count))
    prompts = list(islice(prompts, count))
    burst = run_burst(server, prompts, fields, concurrency, options.tokens, watch_memory=not timed)
    asked = sorted(f["visual"]["method"] for f in fields if f)
    return burst, asked == sorted(a.applied for a in burst.answers if a.applied)


def run(options, servers, variants, progress):
    """Return the cells, in the order of the table."""
    prompts = {
        name: questions(SEED, options.images) for name in servers if name in ("stock", "off")
    }
    prompts |= {name: prompts["off"] for name in servers if name not in prompts}
    wrong = refcheck(servers, variants, questions(SEED + 1, options.images), options.tokens)
    cells = {(c, v): [] for c in options.concurrency for v in variants}
    peaks, pools, preempted = {}, {}, dict.fromkeys(cells, 0)
    task = progress.add_task("", total=len(cells) * (options.rounds + 1))
    for turn in range(options.rounds + 1):
        start = turn % len(variants)
        for c in options.concurrency:
            for v in variants[start:] + variants[:start]:
                label = f"round {turn}" if turn else "warm-up"
                progress.update(task, description=f"{label}: {v} at {c}")
                before = preemptions(servers[v].metrics())
                # a short burst can pass between two readings of its memory
                for _ in range(2 if turn == 0 and c <= 8 else 1):
                    burst, is_right = measure(servers[v], v, c, options, prompts[v], timed=turn > 0)
                    wrong |= set() if is_right else {v}
                    peaks[c, v] = max(peaks.get((c, v), 0), burst.kv_blocks_peak)
                after = servers[v].metrics()
                preempted[c, v] += preemptions(after) - before
                pools[v] = kv_pool(after)[1]
                if turn:
                    cells[c, v].append(burst)
                progress.advance(task)
        if not progress.console.is_terminal:
            progress.console.print(f"round {turn} of {options.rounds} is done")
    return [
        summary(c, v, bursts, v in wrong)
        | {"kv_mib_peak": round(peaks[c, v] / pools[v] * options.kv_mib, 2)}
        | {"kv_blocks_peak": peaks[c, v], "kv_blocks": pools[v], "preemptions": preempted[c, v]}
        | ratios(c, v, cells)
        for (c, v), bursts in cells.items()
    ]


def numbers(text):
    return [int(part) for part in text.split(",")]


def names(text):
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"must be among {', '.join(VARIANTS)}, got {unknown}")
    return chosen


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="bench.serving")
    add = parser.add_argument
    add("--concurrency", type=numbers, default=[1, 2, 4, 8, 16, 32])
    add("--requests", type=int, help="per cell and round; default 2 x concurrency, at least 8")
    add("--variants", type=names, default=["off", "transprune", "uniform"])
    add("--baseline", action=argparse.BooleanOptionalAction, default=True, help="run stock too")
    add("--rounds", type=int, default=3)
    add("--keep-ratio", type=float, default=0.125)
    add("--tokens", type=int, default=16, help="generated per request")
    add("--images", type=int, choices=(1, 2, 3), default=1, help="per request, 576 tokens each")
    add("--kv-mib", type=int, default=256, help="KV cache of each server")
    add("--dtype", default="float32")
    add("--out", type=Path, help="append one JSON line per cell")
    add("--quick", action="store_true", help="two concurrencies, one round")
    options = parser.parse_args(arguments)
    if options.quick:
        options.concurrency, options.rounds = [1, 4], 1
    if options.tokens < 2:
        parser.error(f"--tokens must be 2 or more, to have a time per token, got {options.tokens}")
    options.variants = list(dict.fromkeys(["off", *options.variants]))
    return options


def main():
    # a plain kill must stop the servers too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options, console = parse(), Console(width=80, highlight=False)
    record = manifest("bench.serving", SEED)
    variants = [*(["stock"] if options.baseline else []), *options.variants]
    arguments, folder = server_arguments(options), cached_checkpoint(SPEC)
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        console.print("Starting servers ...")
        ours = stack.enter_context(LocalServer(folder, arguments, Path(logs, "ours.log")))
        servers = dict.fromkeys(options.variants, ours)
        if options.baseline:
            is_cpu = record["machine"]["gpu"] is None
            stock = StockServer(folder, arguments, Path(logs, "stock.log"), is_cpu=is_cpu)
            servers["stock"] = stack.enter_context(stock)
        try:
            for server in dict.fromkeys(servers.values()):
                server.wait_until_ready()
            columns = [TextColumn("{task.description}"), BarColumn(30)]
            columns += [TimeElapsedColumn(), TimeRemainingColumn()]
            with Progress(*columns, console=console, refresh_per_second=2) as progress:
                cells = run(options, servers, variants, progress)
        except BaseException:
            console.print(*(s.log_tail() for s in dict.fromkeys(servers.values())), markup=False)
            raise
    console.print(cells_table(cells))
    console.print("\n".join(verdicts(cells)))
    if options.out:
        record |= {"model": asdict(SPEC), "server_arguments": arguments}
        record["load_after"] = manifest("", SEED)["machine"]["load"]
        with options.out.open("a") as file:
            for cell in cells:
                print(json.dumps(record | cell), file=file)
    return 0 if all(cell["right"] for cell in cells) else 1
