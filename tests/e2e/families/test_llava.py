"""Other decoders and image layouts than the shared checkpoint's equal their oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from tests.e2e.support import Engine
from tests.oracle.asks import COMPARE, DESCRIBE, WIDE, Ask, image, vflowopt, visual
from tests.oracle.loop import Oracle
from tests.oracle.request import assert_like_oracle
from tests.oracle.visual import importance_of
from tokenprune.demo.checkpoint import build_checkpoint

pytestmark = pytest.mark.vllm

# pytest orders tests by the place of a parameter: those with tiles first, the one with videos first
FAMILIES = [
    pytest.param(("qwen2", "llava_onevision"), id="llava-onevision"),
    pytest.param(("llama", "llava_next"), id="llava-next"),
    pytest.param(("mistral", "llava"), id="mistral"),
    pytest.param(("qwen2", "llava"), id="qwen2"),
    pytest.param(("qwen3", "llava"), id="qwen3"),
]
with_tiles = pytest.mark.parametrize("family", FAMILIES[:2], indirect=True)
with_videos = pytest.mark.parametrize("family", FAMILIES[:1], indirect=True)


@dataclass
class Family:
    """One model, in the engine and in the loop."""

    engine: Engine
    oracle: Oracle


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    decoder, architecture = request.param
    path = tmp_path_factory.mktemp("family") / "model"
    build_checkpoint(path, family=decoder, architecture=architecture)
    engine = Engine(path)
    yield Family(engine, Oracle(path))
    is_idle = engine.is_idle
    engine.close()
    assert is_idle


def test_other_decoders_and_image_layouts_equal_their_oracle(family: Family) -> None:
    asks = [
        Ask(DESCRIBE, (1,)),
        Ask(DESCRIBE, (1,), visual("uniform", 0.3)),
        Ask(DESCRIBE, (2,), visual("transprune", 0.2)),
    ]
    for ask, answer in zip(asks, family.engine.ask(*asks), strict=True):
        assert_like_oracle(family.oracle, ask, answer)


@with_tiles
def test_tiles_and_line_breaks_equal_their_oracle(family: Family) -> None:
    asks = [
        Ask(DESCRIBE, (1,)),
        Ask(DESCRIBE, (1,), vflowopt(0.3)),
        Ask(DESCRIBE, (WIDE,), vflowopt(0.3, threshold=1.5, cell=5)),
        Ask(DESCRIBE, (WIDE,), vflowopt(0.5, threshold=1.5, alpha=1.0)),
        Ask(DESCRIBE, (WIDE,), vflowopt(0.01)),
        Ask(COMPARE, (WIDE + 1, 2), vflowopt(0.2, threshold=1.5)),
    ]
    importance, grids = importance_of(family.oracle, image(WIDE), 1.5, 0)
    assert grids[1][0] < 4 * 144 + 24, "the wide picture must be unpadded"
    breaks = {i for i, x in enumerate(importance) if math.isinf(x)}
    for ask, answer in zip(asks, family.engine.ask(*asks), strict=True):
        kept = assert_like_oracle(family.oracle, ask, answer).trace.kept
        if ask.images == (WIDE,):
            first = set(kept[0])
            assert breaks <= first or first <= breaks


@with_videos
def test_the_frames_of_a_video_equal_their_oracle(family: Family) -> None:
    film = np.stack([np.asarray(image(seed)) for seed in (1, 2, 1, 3)])
    prompt = "USER: <video>\nWhat happens, and is it in <image>\n?\nASSISTANT:"
    data = {"video": [film], "image": [image(5)]}
    for pruning in (None, vflowopt(0.3, threshold=1.5), vflowopt(0.2, alpha=1.5)):
        ask = Ask(prompt, (), pruning)
        (answer,) = family.engine.ask_with(ask, data)
        assert_like_oracle(family.oracle, ask, answer, pictures=[film, image(5)])
