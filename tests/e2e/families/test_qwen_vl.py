"""Models of other families prune like a transformers loop that drops the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.other_checkpoints import IMAGE, build, served
from tests.e2e.support import Engine
from tests.oracle.asks import TEXT, Ask, cuts, image, vflowopt, visual
from tests.oracle.checkpoint import film_metadata
from tests.oracle.loop import Oracle
from tests.oracle.request import assert_like_oracle, compare
from tokenprune.shape import EngineShape

pytestmark = pytest.mark.vllm

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
# Qwen3-VL adds rows after its layers 0 and 1, so cuts lie among them
SHAPE = EngineShape(4, (0, 1, 2), 2048)
ONE = f"USER: {IMAGE}\nWhat is in the picture?\nASSISTANT:"
TWO = f"USER: {IMAGE}\nand\n{IMAGE}\nWhich one is brighter, and why?\nASSISTANT:"


CASES = [
    Ask(TEXT),
    Ask(ONE, (1,)),
    Ask(ONE, (1,), visual("uniform", 1.0)),
    Ask(ONE, (1,), cuts("uniform", [1, 2], [0.6, 0.3])),
    Ask(ONE, (2,), visual("random", 0.25, seed=3)),
    Ask(ONE, (2,), cuts("transprune", [1, 2], [0.6, 0.3])),
    Ask(ONE, (3,), cuts("transprune", [1, 2], [0.6, 0.3], form="paper")),
    Ask(TWO, (1, 2), cuts("transprune", [1, 2], [0.6, 0.3])),
    Ask(TWO, (4, 2), cuts("uniform", [1, 2], [0.6, 0.3])),
    Ask(ONE, (4,), cuts("uniform", [0], [0.3])),
    Ask(ONE, (4,), cuts("transprune", [0, 2], [0.5, 0.2])),
    Ask(ONE, (1,), visual("uniform", 0.001)),
    Ask(ONE, (1,), vflowopt(0.3)),
    Ask(ONE, (2,), vflowopt(0.3, threshold=1.3, cell=2)),
    Ask(ONE, (3,), vflowopt(0.4, threshold=1.3, alpha=2.0)),
    Ask(ONE, (3,), vflowopt(None, stages=[0.2, 1, 1])),
    Ask(TWO, (1, 2), vflowopt(0.3, threshold=1.3)),
]
VIDEO = "USER: <|vision_start|><|video_pad|><|vision_end|>\nWhat happens?\nASSISTANT:"
# not square, so that rows and columns cannot be taken for one another, and noisy in places, so that
# entropies differ
NOISE = np.random.default_rng(0).integers(0, 48, (64, 96, 3), dtype=np.uint8)
NOISE[:, np.arange(96) % 40 < 20] = 0
FILM = np.stack([np.asarray(image(seed))[:64] // 2 + NOISE for seed in (1, 2, 3, 1)])
FLAT = Image.fromarray(FILM[2])
WATCHED = [
    Ask(VIDEO),
    Ask(VIDEO, (), cuts("transprune", [1, 2], [0.6, 0.3])),
    Ask(VIDEO, (), vflowopt(0.3, threshold=1.3)),
    Ask(VIDEO, (), vflowopt(0.4, threshold=1.3, alpha=20.0)),
]


@pytest.fixture(scope="module", params=NAMES)
def model(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    name = request.param
    return build(name, checkpoint, tmp_path_factory.mktemp("families") / name)


@pytest.fixture(scope="module")
def other(model: Path) -> Iterator[Engine]:
    engine = Engine(
        served(model),
        prune_layers=list(SHAPE.prune_layers),
        limit_mm_per_prompt={"image": 2, "video": 1},
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def loop(model: Path) -> Oracle:
    return Oracle(model)


def test_a_batch_of_all_cases_equals_a_transformers_loop(other: Engine, loop: Oracle) -> None:
    answers = other.ask(*CASES)
    for ask, answer in zip(CASES, answers, strict=True):
        assert_like_oracle(loop, ask, answer, shape=SHAPE)
    assert other.blocks_missing == 0


def test_videos_and_pictures_that_are_not_square_equal_a_transformers_loop(
    other: Engine, loop: Oracle
) -> None:
    data = {"video": [(FILM, film_metadata(FILM))]}
    for ask in WATCHED:
        (answer,) = other.ask_with(ask, data)
        assert_like_oracle(loop, ask, answer, pictures=[FILM], shape=SHAPE)
    for ask in (Ask(ONE, (), a.pruning) for a in WATCHED[2:]):
        (answer,) = other.ask_with(ask, {"image": [FLAT]})
        assert_like_oracle(loop, ask, answer, pictures=[FLAT], shape=SHAPE)


def test_dropping_rows_changes_the_answer_so_the_comparison_can_fail(
    other: Engine, loop: Oracle
) -> None:
    (plain,) = other.ask(Ask(ONE, (1,)))
    assert (
        compare(loop, Ask(ONE, (1,), visual("uniform", 0.3)), plain, shape=SHAPE).difference > 0.01
    )


def test_prompts_in_chunks_end_at_the_same_log_probs(model: Path, loop: Oracle) -> None:
    engine = Engine(
        served(model),
        prune_layers=list(SHAPE.prune_layers),
        limit_mm_per_prompt={"image": 2, "video": 1},
        max_num_batched_tokens=64,
    )
    try:
        for ask, answer in zip(CASES, engine.ask(*CASES), strict=True):
            assert_like_oracle(loop, ask, answer, shape=SHAPE)
        assert engine.is_idle
    finally:
        engine.close()
