"""One process of `check.py`: stock vLLM's answers, or ours and what they must agree with.

    python -m bench.gpu.vllm_checks eager|graphs cuda|cpu DTYPE stock|ours FOLDER

Rounding differs between batch sizes and from float64, so a near tie may choose another token or
another visual row. Answers are therefore compared up to the first such tie, and the float64 loop
drops the rows that the engine chose; how many of them it would choose itself is a figure apart.
"""

import json
import random
import sys
from pathlib import Path

SEED = 20
# largest difference of log-probs; the random model's logits have a deviation of about 2
TOLERANCES = {("cpu", "float32"): 1e-4, ("cuda", "float32"): 1e-3, ("cuda", "bfloat16"): 0.25}
# share of the visual rows on which we and float64 must agree
AGREEMENT = {"float32": 0.98, "bfloat16": 0.85}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}


def start(mode, device, dtype, *, pruning):
    from tests.e2e.support import Engine
    from tokenprune.demo.checkpoint import CheckpointSpec, cached_checkpoint

    checkpoint = cached_checkpoint(CheckpointSpec())
    arguments = {"dtype": dtype, "async_scheduling": True, "seed": SEED}
    if mode == "graphs":
        arguments |= {"enforce_eager": False, "compilation_config": GRAPHS}
    if device == "cuda":
        arguments |= {"attention_backend": "TRITON_ATTN", "mm_encoder_attn_backend": "TORCH_SDPA"}
    if pruning:
        arguments["allow_channel_pruning"] = True
    return Engine(checkpoint, pruning=pruning, **arguments), checkpoint


def distance(answer, expected, tolerance):
    """Return the largest difference of log-probs; infinite where tokens differ without a tie."""
    largest = 0.0
    for step, (a, b) in enumerate(zip(answer.logprobs, expected.logprobs, strict=True)):
        largest = max([largest, *(abs(a[t] - b[t]) for t in a.keys() & b.keys())])
        ours, theirs = answer.tokens[step], expected.tokens[step]
        if ours != theirs:
            is_tie = theirs in a and abs(a[ours] - a[theirs]) <= 2 * tolerance
            return largest if is_tie else float("inf")
    return largest


class Watch:
    """Records the address of every layer's lengths in full CUDA graphs, and the rows chosen."""

    def __init__(self):
        from vllm.config.compilation import CUDAGraphMode

        from tokenprune.engine.model_state import StagedModelState
        from tokenprune.policies.visual.transprune import TransPrune

        self.addresses, self.replays, self.chosen = {}, 0, []
        prepare, select = StagedModelState.prepare_attn, TransPrune.select

        def prepare_attn(state, batch, mode, *args, **kwargs):
            metadata = prepare(state, batch, mode, *args, **kwargs)
            for_capture = kwargs.get("for_capture", len(args) > 4 and args[4])
            if for_capture or mode == CUDAGraphMode.FULL:
                self.replays += not for_capture
                for layer, value in metadata.items():
                    self.addresses.setdefault(layer, set()).add(value.seq_lens.data_ptr())
            return metadata

        def recorded(policy, inputs):
            kept = select(policy, inputs)
            self.chosen.append(kept.tolist())
            return kept

        StagedModelState.prepare_attn, TransPrune.select = prepare_attn, recorded


def check_engine(engine, mode, device, watch):
    config = engine.llm.llm_engine.vllm_config
    graphs = str(config.compilation_config.cudagraph_mode)
    is_async = bool(config.scheduler_config.async_scheduling)
    expected = "FULL_DECODE_ONLY" if (mode, device) == ("graphs", "cuda") else "NONE"
    figures = {"async_scheduling": is_async, "cudagraph_mode": graphs}
    groups = len(engine.scheduler.kv_cache_config.kv_cache_groups)
    # vLLM has no asynchronous scheduling on the CPU
    is_right = is_async == (device == "cuda") and expected in graphs
    yield "engine", is_right, figures | {"kv_groups": groups}


def check_off(engine, folder, mode, tolerance):
    from tests.oracle.stock import answers

    stock = json.loads(Path(folder, f"stock-{mode}.json").read_text())
    ours = json.loads(json.dumps(answers(engine)))
    same, largest = True, 0.0
    for theirs, mine in zip(_sequences(stock), _sequences(ours), strict=True):
        same &= theirs[0] == mine[0]
        for a, b in zip(theirs[1], mine[1], strict=True):
            a, b = dict(map(tuple, a)), dict(map(tuple, b))
            largest = max([largest, *(abs(a[t] - b[t]) for t in a.keys() & b.keys())])
    figures = {"same_tokens": same, "max_diff": largest, "bit_equal": ours == stock}
    yield "off equals stock", same and largest <= tolerance, figures


def _sequences(answers):
    return [sequence for request in answers for sequence in request]


def check_keep_all(engine, tolerance):
    from tests.oracle.asks import COMPARE, DESCRIBE, Ask, visual

    for method in ("uniform", "random", "transprune"):
        worst, equal = 0.0, True
        for prompt, images in ((DESCRIBE, (1,)), (COMPARE, (2, 3))):
            (full,) = engine.ask(Ask(prompt, images, max_tokens=16))
            (kept,) = engine.ask(Ask(prompt, images, visual(method, 1.0), max_tokens=16))
            worst, equal = max(worst, distance(kept, full, tolerance)), equal and kept == full
        figures = {"max_diff": worst, "bit_equal": equal}
        yield f"{method} keeps all", worst <= tolerance, figures


def check_oracle(engine, checkpoint, watch, tolerance, agreement):
    from tests.oracle.asks import COMPARE, DESCRIBE, Ask, image, visual
    from tests.oracle.loop import Oracle
    from tests.oracle.request import SHAPE, pruned_like

    oracle = Oracle(checkpoint)
    cases = {
        "off": Ask(DESCRIBE, (1,)),
        "uniform": Ask(DESCRIBE, (1,), visual("uniform")),
        "uniform from layer 0": Ask(DESCRIBE, (5,), visual("uniform", 0.5, prune_layers=[0, 5])),
        "random": Ask(DESCRIBE, (2,), visual("random", 0.1, seed=7)),
        "transprune": Ask(DESCRIBE, (3,), visual("transprune", 0.125)),
        "transprune, paper": Ask(DESCRIBE, (4,), visual("transprune", 0.25, form="paper")),
        "transprune, 2 images": Ask(COMPARE, (1, 2), visual("transprune", 0.25)),
    }
    for name, ask in cases.items():
        watch.chosen.clear()
        (answer,) = engine.ask(ask)
        images = [image(s) for s in ask.images]
        pruned = pruned_like(oracle, ask, images)
        figures, is_near = {}, True
        if watch.chosen:
            own = oracle.run(ask.prompt, images, answer.tokens[:1], pruned).kept
            ranks = range(144 * len(images))
            pruned.ranks = {}
            for layer, local in zip(sorted(own), watch.chosen, strict=True):
                ranks = [ranks[i] for i in local]
                pruned.ranks[layer] = ranks
            pruned.cuts = {k: n for k, n in pruned.cuts.items() if k in pruned.ranks}
            shares = [len({*own[k]} & {*r}) / len(r) for k, r in pruned.ranks.items()]
            is_near = min(shares) >= agreement
            figures["same_rows"] = round(min(shares), 4)
        trace = oracle.run(ask.prompt, images, answer.tokens, pruned)
        steps = zip(trace.logprobs, answer.logprobs, strict=True)
        worst = max(abs(float(x[t]) - p) for x, found in steps for t, p in found.items())
        yield f"oracle: {name}", worst <= tolerance and is_near, {"max_diff": worst} | figures
    assert len(oracle.decoder.layers) == SHAPE.num_layers


def check_cache(engine, checkpoint, dtype, tolerance):
    from tests.e2e.cases import EVICTED, PACKED, ask_of
    from tests.oracle.loop import Oracle
    from tests.oracle.request import compare

    oracle = Oracle(checkpoint)
    for case in (*EVICTED, *PACKED):
        # in bfloat16 the loop would choose otherwise, and then everything differs
        if dtype == "float32" or case.id in ("streaming", "random"):
            (answer,) = engine.ask(ask_of(case))
            largest = compare(oracle, ask_of(case), answer).difference
            yield f"cache: {case.id}", largest <= tolerance, {"max_diff": largest}


def check_batches(engine, tolerance):
    from tests.e2e.contract import KV_ASKS as EVICTED
    from tests.e2e.contract import VISUAL_ASKS as PRUNED
    from tests.e2e.support import drain, start

    asks = [*PRUNED, *EVICTED]

    def alone(ask):
        engine.llm.reset_prefix_cache()
        return engine.ask(ask)[0]

    expected, worst = [alone(ask) for ask in asks], 0.0
    for seed in range(3):
        order = random.Random(seed).sample(range(len(asks)), len(asks))
        answers = engine.ask(*(asks[i] for i in order))
        pairs = zip(order, answers, strict=True)
        worst = max([worst, *(distance(a, expected[i], tolerance) for i, a in pairs)])
    yield "mixed batches equal each alone", worst <= tolerance, {"max_diff": worst}

    rng, live, aborted, most = random.Random(SEED), [], 0, 0
    for _ in range(60):
        ask = rng.choice(asks)
        ask = type(ask)(ask.prompt, ask.images, ask.pruning, rng.randint(1, 24))
        live.append(start(engine, ask))
        for _ in range(rng.randint(0, 3)):
            engine.llm.llm_engine.step()
        most = max(most, engine.blocks_missing)
        if rng.random() < 0.2:
            engine.llm.llm_engine.abort_request([live.pop(rng.randrange(len(live)))])
            aborted += 1
    drain(engine)
    missing, plans = engine.blocks_missing, len(engine.scheduler._plans)
    figures = {"aborted": aborted, "most_held": most, "missing": missing, "plans": plans}
    yield "all blocks return", most > 0 and missing == plans == 0, figures


def check_addresses(mode, device, watch):
    counts = {len(found) for found in watch.addresses.values()}
    figures = {"layers": len(watch.addresses), "replays": watch.replays}
    if (mode, device) == ("graphs", "cuda"):
        is_right = watch.replays > 0 and counts == {1}
        yield "graphs read lengths at one address", is_right, figures | {"addresses": max(counts)}
    else:
        yield "no full graphs in this mode", watch.replays == 0, figures


def main(mode, device, dtype, which, folder):
    if device == "cpu":
        from tokenprune.vllm_on_cpu import activate

        activate()
    if which == "stock":
        from tests.oracle.stock import answers

        engine, _ = start(mode, device, dtype, pruning=False)
        Path(folder, f"stock-{mode}.json").write_text(json.dumps(answers(engine)))
        return
    tolerance = TOLERANCES[device, dtype]
    watch = Watch()
    engine, checkpoint = start(mode, device, dtype, pruning=True)
    for checks in (
        check_engine(engine, mode, device, watch),
        check_off(engine, folder, mode, tolerance),
        check_keep_all(engine, tolerance),
        check_oracle(engine, checkpoint, watch, tolerance, AGREEMENT[dtype]),
        check_cache(engine, checkpoint, dtype, tolerance),
        check_batches(engine, tolerance),
        check_addresses(mode, device, watch),
    ):
        for name, is_right, figures in checks:
            with Path(folder, f"{mode}.records").open("a") as file:
                print(json.dumps({"check": name, "ok": bool(is_right)} | figures), file=file)
    Path(folder, f"stock-{mode}.json").unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
