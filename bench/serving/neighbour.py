"""How long a small request waits that comes after a long pruned prompt, beside running decodes.

    python -m bench.serving.neighbour [--images 7] [--decodes 4] [--rounds 5]
        [--variants off,transprune,uniform] [--max-num-batched-tokens 4096] [--out FILE]

Each round and variant, in turns: `--decodes` text requests decode; then a prompt with `--images`
pictures of 576 tokens each is sent, pruned to `--keep-ratio`, and half a second later a text
request for one token. No picture and no text is sent twice to the server. Shown are medians over
the rounds, and the longest: of the small request's and the long prompt's time to first token, and
of the longest gap between two tokens of a running decode.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track

from bench.common import manifest, table
from bench.serving.load import MODEL, ask, questions
from bench.serving.run import METHODS, SEED, SPEC, fields_of
from tokenprune.demo.checkpoint import cached_checkpoint
from tokenprune.demo.local_server import LocalServer

TIMEOUT_SECONDS = 300.0
PAUSE_SECONDS = 0.5


def server_arguments(options):
    return [
        *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"),
        *("--max-num-batched-tokens", str(options.max_num_batched_tokens)),
        *("--max-model-len", "4096", "--kv-cache-memory-bytes", str(512 << 20)),
        *("--limit-mm-per-prompt", json.dumps({"image": options.images})),
    ]


def text(number):
    return [{"role": "user", "content": f"Note {number:06d}. Write a long story about the sea."}]


async def one_round(server, options, pruning, messages, number):
    """Return the times of one round in seconds."""
    async with server.async_client(TIMEOUT_SECONDS) as client, asyncio.TaskGroup() as group:
        began = [asyncio.Event() for _ in range(options.decodes)]
        decodes = [
            group.create_task(ask(client, text(number + i), None, options.tokens, event))
            for i, event in enumerate(began)
        ]
        for event in began:
            await event.wait()
        long = group.create_task(ask(client, messages, pruning, 2))
        await asyncio.sleep(PAUSE_SECONDS)
        started = time.perf_counter()
        await ask(client, text(number + options.decodes), None, 1)
        small = time.perf_counter() - started
        answer = await long
        applied = answer.applied
        if pruning is not None and applied != pruning["visual"]["method"]:
            raise SystemExit(f"the long prompt must be pruned as asked, got {applied}")
    gaps = [gap for task in decodes for gap in task.result().gaps_ms]
    return {
        "small_s": small,
        "long_s": answer.ttft_ms / 1e3,
        "gap_s": max(gaps) / 1e3,
        "prompt_tokens": answer.prompt_tokens,
    }


def rows(results):
    """Return the lines of the table."""
    lines = [["variant", "small s", "longest", "long prompt s", "longest", "gap s", "longest"]]
    for variant, rounds in results.items():
        line = [variant]
        for name in ("small_s", "long_s", "gap_s"):
            times = [r[name] for r in rounds]
            line += [f"{median(times):.2f}", f"{max(times):.2f}"]
        lines.append(line)
    return lines


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="bench.serving.neighbour")
    add = parser.add_argument
    add("--images", type=int, default=7)
    add("--decodes", type=int, default=4)
    add("--tokens", type=int, default=300, help="of each decode")
    add("--rounds", type=int, default=5)
    add("--variants", type=lambda value: value.split(","), default=["off", "transprune", "uniform"])
    add("--keep-ratio", type=float, default=0.25)
    add("--max-num-batched-tokens", type=int, default=4096)
    add("--out", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.variants if name not in ("off", *METHODS)]:
        parser.error(f"--variants must be among off, {', '.join(METHODS)}, got {unknown}")
    return options


def main():
    options, console = parse(), Console(width=80, highlight=False)
    record = manifest("bench.serving.neighbour", SEED)
    prompts, results = questions(SEED, options.images), {name: [] for name in options.variants}
    with tempfile.TemporaryDirectory() as logs:
        arguments = server_arguments(options)
        with LocalServer(cached_checkpoint(SPEC), arguments, Path(logs, "log")) as server:
            console.print("Starting the server ...")
            server.wait_until_ready()
            # the first round warms up
            for turn in track(range(options.rounds + 1), "rounds", console=console):
                for place, name in enumerate(options.variants):
                    number = 1000 * (turn * len(options.variants) + place)
                    pruning = fields_of(name, options.keep_ratio)[-1]
                    found = asyncio.run(one_round(server, options, pruning, next(prompts), number))
                    if turn:
                        results[name].append(found)
    console.print(table(rows(results)))
    if options.out:
        record |= {"server_arguments": arguments, "rounds": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
