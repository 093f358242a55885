"""What models with plain decoders promise: visual methods without a tower equal the one loop."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.plain_checkpoints import build_plain
from tests.e2e.support import Engine
from tests.oracle.asks import TEXT, Ask, cuts, vflowopt, visual
from tests.oracle.loop import Oracle
from tests.oracle.request import assert_like_oracle, compare
from tokenprune.shape import EngineShape

SHAPE = EngineShape(4, (0, 1, 2), 2048)


def cases(image: str) -> list[Ask]:
    """Return what goes through one batch, pruned and not; `image` stands for an image."""
    one = f"USER: {image}\nWhat is in the picture?\nASSISTANT:"
    two = f"USER: {image}\nand\n{image}\nWhich one is brighter, and why?\nASSISTANT:"
    return [
        Ask(TEXT),
        Ask(one, (1,)),
        Ask(one, (1,), cuts("uniform", [1, 2], [0.6, 0.3])),
        Ask(one, (2,), visual("random", 0.25, seed=3)),
        Ask(one, (2,), cuts("transprune", [1, 2], [0.6, 0.3])),
        Ask(two, (1, 2), cuts("transprune", [1, 2], [0.6, 0.3])),
        Ask(one, (4,), cuts("uniform", [0], [0.3])),
        Ask(one, (1,), visual("uniform", 0.001)),
    ]


def assert_like_a_transformers_loop(name: str, image: str, tokenizer_of: Path, path: Path) -> None:
    """Run the cases in one engine and compare each with the loop.

    Its tower cannot be scored, so vflowopt must drop nothing.
    """
    build_plain(name, tokenizer_of, path)
    engine, loop = Engine(path, prune_layers=[1, 2], limit_mm_per_prompt={"image": 2}), Oracle(path)
    try:
        asks = cases(image)
        answers = engine.ask(*asks)
        for ask, answer in zip(asks, answers, strict=True):
            found = assert_like_oracle(loop, ask, answer, shape=SHAPE)
            assert bool(found.trace.kept) == bool(ask.pruning)
        # a row more or less would show
        assert compare(loop, asks[2], answers[1], shape=SHAPE).difference > 0.01
        (unscored,) = engine.ask(Ask(asks[1].prompt, (1,), vflowopt(0.3)))
        assert unscored.agrees_with(answers[1])
        assert engine.is_idle
    finally:
        engine.close()
