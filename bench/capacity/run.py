"""How many requests one KV pool carries: stock vLLM, tokenprune off, LagKV, ThinK, and both.

    python -m bench.capacity [--prompt 2048] [--new 64] [--pool-prompts 12] [--out FILE]

Every engine has the same pool (`--pool-prompts` unpruned prompts), the same random Llama, the same
prompts and block size, runs in a process of its own, and they take turns at each load. A load is
closed: so many requests are in flight at any time. The last load is more than any of them can hold
and shows the peak; the others show throughput at concurrency 1 to 32. Blocks are compared with the
formula of `tokenprune.lengths` after every step: what a step empties comes back one step later.

Capacity and speed are two claims. Random weights say nothing about quality, the third.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from bench.capacity.report import BLOCK, LAG, SINK, markdown
from bench.common import manifest
from bench.small_llama import SEED, VOCAB, save_model, start

_THINK = {"pruning_channels_method": "think", "pruning_channels_keep_ratio": 0.5}


def _lagkv(keep_ratio):
    keys = {"method": "lagkv", "sink": SINK, "lag": LAG, "keep_ratio": keep_ratio}
    return {f"pruning_kv_{key}": value for key, value in keys.items()}


# what each request asks for
MODES = {
    "stock": None,
    "off": None,
    "think": _THINK,
    "2x": _lagkv(0.5),
    "4x": _lagkv(0.25),
    "8x": _lagkv(0.125),
    "4x+think": _lagkv(0.25) | _THINK,
}


def serve(mode, folder, prompt, new, pool, most):
    """Answer `concurrency requests` lines with what one load showed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ours = mode != "stock"
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "tokenprune" if ours else "",
    }
    arguments = {}
    import torch

    if ours:
        from tokenprune.engine.launch import engine_arguments
        from tokenprune.vllm_on_cpu import activate

        if not torch.cuda.is_available():
            activate()
        arguments = engine_arguments(prune_layers=[], allow_channel_pruning="think" in mode)
    elif not torch.cuda.is_available():
        # what a plain vllm serve uses there
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=prompt + new + BLOCK,
        max_num_batched_tokens=prompt,
        max_num_seqs=most,
        block_size=BLOCK,
        num_gpu_blocks_override=pool + 1,
        kv_cache_memory_bytes=4 << 30,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        **arguments,
    ).llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    blocks = scheduler.kv_cache_manager.block_pool
    preempt, preempted = scheduler._preempt_request, []

    def counted(*args, **kwargs):
        preempted.append(1)
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    params = SamplingParams(
        temperature=0,
        max_tokens=new,
        ignore_eos=True,
        detokenize=False,
        extra_args=MODES[mode],
    )

    def formula():
        total = 0
        for request in scheduler.running:
            plan = getattr(scheduler, "_plans", {}).get(request.request_id)
            n = request.num_computed_tokens
            total += -(-(plan.lengths.physical(n, 0) if plan else n) // BLOCK)
        return total

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        concurrency, count = map(int, line.split())
        rng = random.Random(SEED)
        waiting = [[rng.randrange(VOCAB) for _ in range(prompt)] for _ in range(count)]
        preempted.clear()
        live = sent = peak = tokens = held = expected = alone = 0
        start = time.perf_counter()
        while sent < count or live:
            while sent < count and live < concurrency:
                engine.add_request(f"{line}-{sent}", {"prompt_token_ids": waiting[sent]}, params)
                sent, live = sent + 1, live + 1
            for output in engine.step():
                if output.finished:
                    live -= 1
                    tokens += len(output.outputs[0].token_ids)
            peak = max(peak, len(scheduler.running))
            first = scheduler.running[0] if concurrency == 1 and scheduler.running else None
            # after the prompt's step, when what that one emptied has come back
            if first is not None and not alone and first.num_computed_tokens > prompt:
                alone = blocks.num_gpu_blocks - 1 - blocks.get_num_free_blocks()
            if len(scheduler.running) == min(concurrency, peak):
                held += blocks.num_gpu_blocks - 1 - blocks.get_num_free_blocks()
                expected += formula()
        seconds = time.perf_counter() - start
        while engine.has_unfinished_requests():
            engine.step()
        engine.step()
        answer = {
            "peak": peak,
            "preemptions": len(preempted),
            "tokens_per_second": tokens / seconds,
            "requests_per_second": count / seconds,
            "blocks_alone": alone,
            "blocks_over_formula": held / max(expected, 1),
            "blocks_missing": blocks.num_gpu_blocks - 1 - blocks.get_num_free_blocks(),
        }
        print(json.dumps(answer), file=answers, flush=True)


def main():
    parser = argparse.ArgumentParser("bench.capacity", description=__doc__)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--pool-prompts", type=int, default=12)
    parser.add_argument("--most", type=int, default=64, help="requests an engine may run at once")
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results/capacity-cpu.json"),
        help="what it holds of other modes and loads in the same pool stays",
    )
    parser.add_argument("--serve", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        mode, folder, *numbers = args.serve
        return serve(mode, folder, *map(int, numbers))

    run = manifest("bench.capacity", SEED)
    pool = args.pool_prompts * -(-args.prompt // BLOCK)
    setting = {
        "pool_blocks": pool,
        **{key: getattr(args, key) for key in ("prompt", "new", "pool_prompts")},
    }
    rows, runs = {mode: {} for mode in MODES}, []
    if args.out.is_file():
        before = json.loads(args.out.read_text())
        if all(before[key] == value for key, value in setting.items()):
            rows, runs = rows | before["rows"], before["runs"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        save_model(folder, args.prompt + args.new + BLOCK)
        numbers = (args.prompt, args.new, pool, args.most)
        children = {
            mode: start("bench.capacity", mode, [folder, *numbers], log) for mode in args.modes
        }
        try:
            for turn, concurrency in enumerate(args.loads):
                order = args.modes
                for mode in order[turn % len(order) :] + order[: turn % len(order)]:
                    child = children[mode]
                    print(concurrency, max(concurrency, 2), file=child.stdin, flush=True)
                    # keys of JSON objects are strings
                    rows[mode][str(concurrency)] = json.loads(child.stdout.readline())
        finally:
            for child in children.values():
                child.stdin.close()
                child.wait(timeout=60)
    rows = {mode: row for mode, row in rows.items() if row}
    loads = sorted({int(load) for row in rows.values() for load in row})
    record = {**setting, "loads": loads, "rows": rows, "runs": [*runs, run]}
    print(markdown(record))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    missing = sum(r["blocks_missing"] for by_load in rows.values() for r in by_load.values())
    return 1 if missing else 0
