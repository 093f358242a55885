"""What each axis sends through the contract of `test_batches.py`, and by which engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.support import CRAMPED, Engine, abort, drain, preemptions, start, step
from tests.oracle.asks import COMPARE, DESCRIBE, STORY, TEXT, Ask, channels, kv, vflowopt, visual

Pruning = dict[str, Any] | None

VISUAL_ASKS = [
    Ask(DESCRIBE, (1,)),
    Ask(DESCRIBE, (1,), visual("transprune", 0.125)),
    Ask(DESCRIBE, (1,), visual("uniform", 0.25)),
    Ask(TEXT),
    Ask(DESCRIBE, (2,), visual("random", 0.5, seed=3)),
    Ask(COMPARE, (1, 2), visual("transprune", 0.25)),
    Ask(COMPARE, (1, 2)),
    Ask(COMPARE, (2, 1), vflowopt(0.25, threshold=1.5)),
    Ask(DESCRIBE, (2,)),
]
KV_ASKS = [
    Ask(STORY, max_tokens=24),
    Ask(STORY, (), kv("lagkv"), 24),
    Ask(STORY, (), kv("streaming", 0.5, lag=16), 24),
    Ask(DESCRIBE, (1,), max_tokens=24),
    Ask(DESCRIBE, (1,), kv("random", seed=3) | visual("uniform", 0.25), 24),
    Ask(COMPARE, (1, 2), kv("lagkv") | visual("transprune", 0.25), 24),
    Ask(TEXT, max_tokens=24),
]
# the shared checkpoint has heads of 32 channels, so half of the keys' are 16
CHANNEL_ASKS = [
    Ask(STORY, max_tokens=40),
    Ask(STORY, (), channels(), 40),
    Ask(STORY, (), channels(values_keep_ratio=0.5) | kv("lagkv", 0.5), 40),
    Ask(DESCRIBE, (1,), max_tokens=40),
    Ask(DESCRIBE, (1,), channels(recent=20), 40),
    Ask(COMPARE, (1, 2), channels() | visual("transprune", 0.5) | kv("lagkv", 0.5), 40),
    Ask(TEXT, max_tokens=40),
]


@dataclass(frozen=True)
class Traffic:
    """Random requests.

    Attributes:
        count: How many.
        choices: Flat keys of one of them.
        max_tokens: Most tokens of an answer.
        most_steps: Most steps between two of them.
        must_preempt: Whether the pool is too small for them.
    """

    count: int
    choices: list[Pruning]
    max_tokens: int
    most_steps: int
    must_preempt: bool


@dataclass(frozen=True)
class Axis:
    """One axis of pruning.

    Attributes:
        name: In the names of tests.
        asks: Requests that share batches, pruned and not.
        num_orders: In how many orders.
        prompt: What requests have in common that share a prefix.
        prunings: Two ways to prune such a request.
        traffic: What goes through the cramped engine.
        draw: Draws the prompt and images of a random request.
        crowds: Requests that must preempt one another, by name.
        repeats_itself: Whether a preempted request ends as if it had not been; one that evicts or
            packs does not, since its generated tokens come back as part of its prompt.
        engine: Arguments of the engine.
        cramped: Arguments of one that must cut prompts into chunks and preempt.
    """

    name: str
    asks: list[Ask]
    num_orders: int
    prompt: tuple[str, tuple[int, ...]]
    prunings: tuple[Pruning, Pruning]
    traffic: Traffic
    draw: Callable[[random.Random], tuple[str, tuple[int, ...]]]
    crowds: dict[str, list[Ask]]
    repeats_itself: bool
    engine: dict[str, Any] = field(default_factory=dict)
    cramped: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _picture_or_text(rng: random.Random) -> tuple[str, tuple[int, ...]]:
    return (DESCRIBE, (rng.randrange(4),)) if rng.random() < 0.7 else (TEXT, ())


def _start_of_story(rng: random.Random) -> tuple[str, tuple[int, ...]]:
    words = STORY.split()
    return " ".join(words[: rng.randint(1, len(words))]), ()


VISUAL = Axis(
    name="visual",
    asks=VISUAL_ASKS,
    num_orders=4,
    prompt=(DESCRIBE, (9,)),
    prunings=(visual("uniform"), visual("transprune")),
    draw=_picture_or_text,
    traffic=Traffic(
        count=300,
        choices=[
            None,
            visual("uniform", 0.3),
            visual("random", 0.1, seed=2),
            visual("transprune", 0.25),
            visual("uniform", 0.2, prune_layers=[0, 5]),
            vflowopt(0.3, threshold=1.5),
        ],
        max_tokens=12,
        most_steps=2,
        must_preempt=False,
    ),
    crowds={
        "visual": [
            Ask(DESCRIBE, (seed,), pruning, max_tokens=150)
            for seed in (1, 2)
            for pruning in (visual("transprune", 0.25), None, visual("uniform", 0.5))
        ],
        "vflowopt": [
            Ask(DESCRIBE, (seed,), pruning, max_tokens=150)
            for seed in (1, 2, 3)
            for pruning in (None, vflowopt(0.5, threshold=1.5))
        ],
    },
    repeats_itself=True,
    cramped=CRAMPED | {"num_gpu_blocks_override": 140},
)
KV = Axis(
    name="kv",
    asks=KV_ASKS,
    num_orders=2,
    prompt=(STORY, ()),
    prunings=(kv("lagkv"), kv("streaming")),
    draw=_start_of_story,
    traffic=Traffic(
        count=2000,
        choices=[
            None,
            kv("lagkv"),
            kv("lagkv", 0.5, when="chunk"),
            kv("lagkv", lag=40),
            kv("streaming", 0.5, lag=16, when="chunk"),
            kv("random", seed=2, lag=16),
            kv("lagkv", 1.0),
        ],
        max_tokens=40,
        most_steps=4,
        must_preempt=True,
    ),
    crowds={
        "kv": [
            Ask(STORY[: len(STORY) // 2], (), pruning, max_tokens=100)
            for pruning in (None, kv("lagkv", 0.5, lag=32), kv("streaming", 0.5, lag=32))
        ]
        * 2
    },
    repeats_itself=False,
    cramped=CRAMPED | {"num_gpu_blocks_override": 20, "prune_layers": []},
)
CHANNELS = Axis(
    name="channels",
    asks=CHANNEL_ASKS,
    num_orders=2,
    prompt=(STORY, ()),
    prunings=(channels(), channels(values_keep_ratio=0.5)),
    draw=_start_of_story,
    traffic=Traffic(
        count=60,
        choices=[
            None,
            channels(),
            channels(recent=0, window=1, values_keep_ratio=0.5),
            channels(pack_generated=False),
            channels() | kv("lagkv"),
            channels(recent=30) | kv("lagkv", 0.5, when="chunk"),
            channels() | kv("random", seed=2, lag=16),
            channels() | kv("streaming"),
        ],
        max_tokens=90,
        most_steps=2,
        must_preempt=True,
    ),
    crowds={
        "channels": [
            Ask(STORY, (), pruning, max_tokens=100)
            for pruning in (None, channels(), channels() | kv("lagkv", 0.5, lag=32))
        ]
        * 2
    },
    repeats_itself=False,
    engine={"allow_channel_pruning": True},
    cramped=CRAMPED
    | {"num_gpu_blocks_override": 20, "prune_layers": [], "allow_channel_pruning": True},
)
AXES = [VISUAL, KV, CHANNELS]


def send_at_random(engine: Engine, axis: Axis) -> int:
    """Send an axis' traffic, aborting some; return how often a request was preempted."""
    rng, live = random.Random(0), list[str]()
    with preemptions(engine) as preempted:
        for _ in range(axis.traffic.count):
            pruning = rng.choice(axis.traffic.choices)
            ask = Ask(*axis.draw(rng), pruning, rng.randint(1, axis.traffic.max_tokens))
            live.append(start(engine, ask))
            step(engine, rng.randint(0, axis.traffic.most_steps))
            if rng.random() < 0.2:
                abort(engine, [live.pop(rng.randrange(len(live)))])
            # so that some requests start in an empty engine, and aborts meet running ones
            if len(live) > 40:
                drain(engine)
                live.clear()
        drain(engine)
    return len(preempted)
