"""Time a decode step on the CPU: V1, V2 interpreted, V2 with our kernels, and all of tokenprune.

    python -m bench.decode_step [--rounds 3] [--steps 20] [--out FILE]

Four engines on one tiny random Llama (greedy, eager, one process each) take turns, so that a
busy machine slows all of them. A mode whose tokens differ from V1's prints WRONG and no time.
The last mode adds our worker and scheduler with three stage boundaries, which make eight KV cache
groups; nothing is pruned, so it shows what requests pay that do not use us.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.common import manifest
from bench.small_llama import SEED, save_model, start

MODES = ("v1", "v2-interpreted", "v2-replaced", "tokenprune")
PRUNE_LAYERS = (2, 3, 5)
BATCH_SIZES = (1, 4, 16)
PROMPT_TOKENS = 40


def serve(mode, folder):
    """Answer `batch steps` lines with the tokens and the milliseconds of each decode step."""
    # libraries print to stdout: keep the real one for answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}
    if mode == "v1":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    else:
        from tokenprune.vllm_on_cpu import activate

        activate()
    if mode == "v2-replaced":
        from tokenprune.vllm_on_cpu import kernels as cpu_kernels

        cpu_kernels.register()
    arguments = {}
    if mode == "tokenprune":
        from tokenprune.engine.launch import engine_arguments

        os.environ["VLLM_PLUGINS"] = "tokenprune"
        arguments = engine_arguments(PRUNE_LAYERS)
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=max(BATCH_SIZES),
        kv_cache_memory_bytes=64 << 20,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        **arguments,
    ).llm_engine
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        batch, steps = map(int, line.split())
        params = SamplingParams(
            temperature=0, max_tokens=steps + 1, ignore_eos=True, detokenize=False
        )
        for i in range(batch):
            prompt = {"prompt_token_ids": list(range(7 * i + 3, 7 * i + 3 + PROMPT_TOKENS))}
            engine.add_request(str(i), prompt, params)
        times, tokens = [], {}
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            outputs = engine.step()
            times.append(1e3 * (time.perf_counter() - start))
            tokens |= {o.request_id: list(o.outputs[0].token_ids) for o in outputs}
        # the first step is the prefill
        answer = {"step_ms": times[1:], "tokens": [tokens[key] for key in sorted(tokens)]}
        print(json.dumps(answer), file=answers, flush=True)


def measure(children, batch, steps):
    answers = {}
    for mode, child in children.items():
        print(batch, steps, file=child.stdin, flush=True)
        answers[mode] = json.loads(child.stdout.readline())
    return answers


def main():
    parser = argparse.ArgumentParser("bench.decode_step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu-step.json"))
    parser.add_argument("--serve", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve)

    run = manifest("bench.decode_step", SEED)
    raw = {mode: {batch: [] for batch in BATCH_SIZES} for mode in MODES}
    wrong = set()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        save_model(folder)
        children = {mode: start("bench.decode_step", mode, [folder], log) for mode in MODES}
        for round_ in range(args.rounds + 1):
            # round 0 warms up; later ones rotate the order
            order = MODES[round_ % 4 :] + MODES[: round_ % 4]
            for batch in BATCH_SIZES:
                turn = {mode: children[mode] for mode in order}
                answers = measure(turn, batch, args.steps if round_ else 3)
                expected = answers["v1"]["tokens"]
                wrong |= {(m, batch) for m in MODES if answers[m]["tokens"] != expected}
                if round_:
                    for mode in MODES:
                        raw[mode][batch] += answers[mode]["step_ms"]
        for child in children.values():
            child.stdin.close()
            child.wait(timeout=60)

    medians = {mode: {b: statistics.median(raw[mode][b]) for b in BATCH_SIZES} for mode in MODES}
    table = Table(title="decode step on the CPU, median ms (above V1)")
    table.add_column("runner")
    for batch in BATCH_SIZES:
        table.add_column(f"batch {batch}", justify="right")
    for mode in MODES:
        cells = [
            "WRONG" if (mode, b) in wrong else f"{ms:.1f} ({ms - medians['v1'][b]:+.1f})"
            for b, ms in medians[mode].items()
        ]
        table.add_row(mode, *cells)
    Console(width=80).print(table)
    result = run | {"median_ms": medians, "raw_ms": raw}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result | {"wrong": sorted(wrong)}) + "\n")
    return 1 if wrong else 0
