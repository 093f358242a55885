"""Models that we cannot prune are served unpruned, exactly as stock vLLM serves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.other_checkpoints import IMAGE, build
from tests.e2e.support import Engine
from tests.oracle.asks import TEXT, Answer, Ask, image, visual
from tests.plans import reasons
from tokenprune.engine.shape import engine_shape
from tokenprune.errors import PolicyError
from tokenprune.plan import RequestPlan, make_plan
from tokenprune.request import parse_flat
from tokenprune.server.admission import layout_of
from tokenprune.shape import EngineShape

pytestmark = pytest.mark.vllm

MARK = "answers: "
NAMES = ("qwen3_vl", "llama")
REASONS = {
    "qwen3_vl": "vLLM itself prunes videos (--video-pruning-rate)",
    "llama": "LlamaForCausalLM takes no images",
}
DESCRIBE = f"USER: {IMAGE}\nWhat is in the picture?\nASSISTANT:"
COMPARE = f"USER: {IMAGE}\nand\n{IMAGE}\nWhich one is brighter, and why?\nASSISTANT:"
METHODS = [
    visual("transprune"),
    visual("uniform", 0.5),
    visual("random", seed=3),
    {"pruning": "aggressive"},
]


def start(name: str, checkpoint: Path, **arguments: Any) -> Engine:
    if name != "llama":
        arguments["limit_mm_per_prompt"] = {"image": 2, "video": 0}
        # a setting that leaves images as they are, and beside which we prune none
        arguments["video_pruning_rate"] = 0.5
    return Engine(checkpoint, **arguments)


def asks(name: str) -> list[Ask]:
    texts = [Ask("USER: Hello!\nASSISTANT:"), Ask(f"{TEXT} It is fine.\n" * 2 + TEXT)]
    images = [Ask(DESCRIBE, (1,)), Ask(DESCRIBE, (2,)), Ask(COMPARE, (1, 2))]
    return texts if name == "llama" else texts + images


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    return {name: build(name, checkpoint, root / name) for name in NAMES}


@pytest.fixture(scope="module")
def stock(checkpoints: dict[str, Path]) -> dict[str, list[Answer]]:
    """Answers of stock vLLM in a process without our worker and scheduler, by model."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.test_other_models", *map(str, checkpoints.values())],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    )
    # vLLM logs to the same stream
    (line,) = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
    return {
        name: [
            Answer(t, [{int(i): p for i, p in step.items()} for step in ps]) for t, ps in answers
        ]
        for name, answers in zip(checkpoints, json.loads(line.removeprefix(MARK)), strict=True)
    }


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def other(name: str, checkpoints: dict[str, Path]) -> Iterator[Engine]:
    engine = start(name, checkpoints[name])
    yield engine
    engine.close()


@pytest.fixture
def fresh(other: Engine) -> Iterator[Engine]:
    """The engine with an empty prefix cache; every test must give all blocks back."""
    other.llm.reset_prefix_cache()
    yield other
    assert other.is_idle


def shape_of(engine: Engine) -> EngineShape:
    return engine_shape(engine.llm.llm_engine.vllm_config)


def test_the_engine_says_why_it_cannot_prune_and_makes_no_stages(other: Engine, name: str) -> None:
    shape = shape_of(other)
    assert (shape.num_layers, shape.boundaries) == (4, (0,))
    assert shape.unsupported["visual"] == REASONS[name]
    assert len(other.groups) == 1


def test_answers_are_stock_vllms_bit_for_bit(
    fresh: Engine, name: str, stock: dict[str, list[Answer]]
) -> None:
    ours = fresh.ask(*asks(name))
    assert ours == stock[name]
    # a model that answers everything alike would prove nothing
    assert len({tuple(answer.tokens) for answer in ours}) == len(ours)


@pytest.mark.parametrize("offset", [0, 2])
def test_asking_for_pruning_changes_no_bit(
    fresh: Engine, name: str, stock: dict[str, list[Answer]], offset: int
) -> None:
    pruned = [
        replace(ask, pruning=METHODS[(i + offset) % len(METHODS)])
        for i, ask in enumerate(asks(name))
    ]
    assert fresh.ask(*pruned) == stock[name]


def test_requests_that_ask_for_pruning_share_the_prefix_cache_with_the_others(
    fresh: Engine, name: str
) -> None:
    plain = asks(name)[-1]
    (first,) = fresh.ask(replace(plain, pruning=METHODS[0]))
    filled = fresh.num_cached
    assert filled > 0
    (second,) = fresh.ask(plain)
    (third,) = fresh.ask(replace(plain, pruning=METHODS[0]))
    assert fresh.num_cached == filled
    # a warm cache leaves fewer rows to multiply, and these round otherwise
    assert second == third
    assert second.agrees_with(first)


def explicit(engine: Engine, ask: Ask) -> RequestPlan:
    """Plan `ask` as the HTTP server does, from the prompt it would send to this engine."""
    data = {"multi_modal_data": {"image": [image(s) for s in ask.images]}} if ask.images else {}
    rendered = engine.llm._preprocess_cmpl_one({"prompt": ask.prompt, **data})
    plan = make_plan(parse_flat(ask.pruning), layout_of(rendered), shape_of(engine))
    plan.refuse_what_is_skipped()
    return plan


@pytest.mark.parametrize("name", ["qwen3_vl"], indirect=True)
def test_the_server_refuses_to_prune_an_image_and_says_why(fresh: Engine, name: str) -> None:
    for pruning in METHODS:
        with pytest.raises(PolicyError) as refused:
            explicit(fresh, Ask(DESCRIBE, (9,), pruning))
        expected = f"pruning.visual must be left out with this model: {REASONS[name]}"
        assert str(refused.value) == expected
        assert refused.value.param == "pruning.visual"


def test_the_server_takes_a_text_that_asks_for_pruning_and_prunes_nothing(fresh: Engine) -> None:
    for pruning in METHODS:
        plan = explicit(fresh, Ask(TEXT, pruning=pruning))
        assert not plan.is_pruned
        assert reasons(plan) == {"visual": "model_unsupported"}


def test_stages_and_a_default_set_by_hand_change_no_bit(
    checkpoints: dict[str, Path], stock: dict[str, list[Answer]]
) -> None:
    ours = {"prune_layers": [1, 3], "default": "aggressive"}
    engine = start("qwen3_vl", checkpoints["qwen3_vl"], additional_config={"tokenprune": ours})
    try:
        assert shape_of(engine).boundaries == (0, 1, 3)
        assert shape_of(engine).unsupported["visual"] == REASONS["qwen3_vl"]
        assert len(engine.groups) > 1
        assert engine.ask(*asks("qwen3_vl")) == stock["qwen3_vl"]
        assert engine.blocks_missing == 0
    finally:
        engine.close()


if __name__ == "__main__":
    from tokenprune.vllm_on_cpu import activate

    activate()
    results = []
    for model, path in zip(NAMES, sys.argv[1:], strict=True):
        plain = start(model, Path(path), pruning=False)
        results.append([[a.tokens, a.logprobs] for a in plain.ask(*asks(model))])
        plain.close()
    print(MARK + json.dumps(results))
