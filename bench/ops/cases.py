"""What the operator bench calls: per operator how to build its inputs, and real models' sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune import kernels

SEED = 20
TEXT_ROWS, BLOCK_SIZE = 48, 16
# operators of `tokenprune.kernels`: what has a reference
OPERATORS = tuple(op for op in kernels.__all__ if f"{op}_reference" in kernels.__all__)


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        op: Its name.
        tensors: Its tensors by name.
        options: Its other arguments by name.
        written: The tensor it writes into, where it returns nothing of its own.
        tolerance: Largest absolute error; choices are exact.
        moved: Bytes read and written; None for the tensors once each.
    """

    op: str
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    written: str | None = None
    tolerance: float = 1e-7
    moved: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that have to be moved at least."""
        return sum(x.nbytes for x in self.tensors.values()) if self.moved is None else self.moved

    def bound(self, backend: str) -> Callable[[], Any]:
        """Return the call of one backend, ready to be timed."""
        operator = getattr(kernels, self.op)
        return partial(operator, **self.tensors, **self.options, backend=backend)

    def is_right(self) -> bool:
        """Tell whether the kernel's result is that of the reference, which gets float64."""
        mine = {name: x.clone() for name, x in self.tensors.items()}
        found = getattr(kernels, self.op)(**mine, **self.options, backend="triton")
        exact = {n: x.double() if x.is_floating_point() else x for n, x in self.tensors.items()}
        expected = getattr(kernels, f"{self.op}_reference")(**exact, **self.options)
        if self.written is not None:
            found, expected = mine[self.written], exact[self.written]
        if isinstance(found, Tensor):
            found, expected = (found,), (expected,)
        return all(
            torch.allclose(x.double(), y.double(), rtol=1e-4, atol=self.tolerance)
            for x, y in zip(found, expected, strict=True)
        )


@dataclass(frozen=True)
class Draw:
    """Where the inputs of a call come from: the same numbers on every run."""

    device: str
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    @property
    def rounding(self) -> float:
        """Error of a result of order 1 that is rounded to `dtype`."""
        return 4 * torch.finfo(self.dtype).eps

    def normal(self, *shape: int) -> Tensor:
        """Return normal numbers of `dtype`."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Return float32 scores in 0..1."""
        return torch.rand(shape, generator=self.generator).to(self.device)

    def order(self, n: int, count: int) -> Tensor:
        """Return `count` of the numbers below `n`, shuffled."""
        return torch.randperm(n, generator=self.generator)[:count].to(self.device)


def visual_of(n: int, device: str) -> Tensor:
    """Return the mask of a prompt that ends with text."""
    position = torch.arange(n, device=device)
    return (position >= 16) & (position < n - TEXT_ROWS)


def transitions(op: str) -> Callable[..., Call]:
    """Rows of a whole prompt."""

    def build(draw: Draw, *, n: int, d: int) -> Call:
        tensors = {"x_in": draw.normal(n, d), "x_out": draw.normal(n, d)}
        tensors["visual"] = visual_of(n, draw.device)
        return Call(op, tensors, {"scope": "all"})

    return build


def instruction_attention(draw: Draw, *, n: int, hq: int, hkv: int, dh: int) -> Call:
    """The text rows at the end of a prompt, and its keys."""
    tensors = {
        "q": draw.normal(hq, TEXT_ROWS, dh),
        "k": draw.normal(hkv, n, dh),
        "q_rows": torch.arange(n - TEXT_ROWS, n, device=draw.device),
        "visual": visual_of(n, draw.device),
    }
    return Call("instruction_attention", tensors, {"scale": dh**-0.5})


def attention_importance(draw: Draw, *, h: int, n: int, dh: int) -> Call:
    """The patches of one crop."""
    tensors = {"q": draw.normal(h, n, dh), "k": draw.normal(h, n, dh)}
    return Call("attention_importance", tensors, {"threshold": 1.0, "scale": dh**-0.5})


def patch_entropy(draw: Draw, *, side: int, patch: int) -> Call:
    """A square picture."""
    image = (draw.uniform(3, side, side) * 256).to(torch.uint8)
    return Call("patch_entropy", {"image": image}, {"patch": patch}, tolerance=1e-5)


def recycle(draw: Draw, *, side: int, d: int) -> Call:
    """A square grid of tokens, of which a third is kept."""
    n = side * side
    tensors = {"features": draw.normal(n, d), "importance": draw.uniform(n)}
    options = {"grid_width": side, "keep": n // 3, "cell": 3.0}
    return Call("recycle", tensors, options, tolerance=draw.rounding)


def lag_scores(draw: Draw, *, h: int, n: int, d: int, lag: int) -> Call:
    """The cache of a prompt."""
    tensors = {"k": draw.normal(h, n, d), "v": draw.normal(h, n, d)}
    return Call("lag_scores", tensors, {"sink": 0, "lag": lag})


def lag_keep(draw: Draw, *, h: int, p: int, lag: int) -> Call:
    """Scores of which half is kept."""
    return Call("lag_keep", {"scores": draw.uniform(h, p, lag)}, {"keep": lag // 2})


def lag_compact(draw: Draw, *, h: int, n: int, d: int) -> Call:
    """A cache that loses half of its rows, others in every head."""
    blocks = -(-n // BLOCK_SIZE)
    tensors = {
        "cache": draw.normal(blocks, h, BLOCK_SIZE, 2 * d),
        "blocks": draw.order(blocks, blocks).int(),
        "source": torch.stack([draw.order(n, n // 2).sort().values for _ in range(h)]),
    }
    rows = h * (n // 2) * 2 * d * tensors["cache"].element_size()
    return Call("lag_compact", tensors, {"begin": 0}, "cache", moved=2 * rows)


def channel_scores(draw: Draw, *, hq: int, h: int, n: int, d: int) -> Call:
    """A window of queries and the cached keys."""
    return Call("channel_scores", {"q": draw.normal(hq, 32, d), "k": draw.normal(h, n, d)})


def packed_decode_attention(draw: Draw, *, requests: int, hq: int, h: int, n: int, d: int) -> Call:
    """A decode step of a batch whose old tokens lost half of their key channels."""
    width = 3 * d // 2
    packed, dense = n * width // (2 * d * BLOCK_SIZE), 32
    blocks = packed + dense // BLOCK_SIZE
    kept = [
        torch.cat([draw.order(d, d // 2).sort().values, d + draw.order(d, d)]) for _ in range(h)
    ]
    places = kernels.places_of(torch.stack(kept), 2 * d)
    rows = [[i, i, packed, dense, width] for i in range(requests)]
    tensors = {
        "query": draw.normal(requests, hq, d),
        "cache": draw.normal(requests * blocks, h, BLOCK_SIZE, 2 * d),
        "blocks": draw.order(requests * blocks, requests * blocks).int().view(requests, blocks),
        "rows": torch.tensor(rows, dtype=torch.int32, device=draw.device),
        "places": places.expand(requests, -1, -1).contiguous(),
        "out": draw.normal(requests, hq, d),
    }
    options = {"scale": d**-0.5}
    return Call("packed_decode_attention", tensors, options, "out", tolerance=draw.rounding)


@dataclass(frozen=True)
class Bench:
    """The cases of one operator.

    Attributes:
        build: Makes a call of a case's sizes.
        sizes: Per case, which is called after the model, the arguments of `build`.
        tiny: What a case has instead where it runs in Triton's interpreter.
    """

    build: Callable[..., Call]
    sizes: Mapping[str, Mapping[str, int]]
    tiny: Mapping[str, int]


CACHES = {
    "llava-1.5-7b": {"h": 32, "n": 4096, "d": 128},
    "qwen2-7b": {"h": 4, "n": 4096, "d": 128},
    "qwen3-8b": {"h": 8, "n": 4096, "d": 128},
}
PROMPTS = {
    "llava-1.5-7b": {"n": 640, "d": 4096},
    "llava-next-7b": {"n": 2944, "d": 4096},
    "qwen2-7b": {"n": 1280, "d": 3584},
}
BENCHES = {
    "transition_scores": Bench(transitions("transition_scores"), PROMPTS, {"n": 90, "d": 200}),
    "transition_terms": Bench(transitions("transition_terms"), PROMPTS, {"n": 90, "d": 200}),
    "instruction_attention": Bench(
        instruction_attention,
        {
            "llava-1.5-7b": {"n": 640, "hq": 32, "hkv": 32, "dh": 128},
            "llava-next-7b": {"n": 2944, "hq": 32, "hkv": 32, "dh": 128},
            "qwen2-7b": {"n": 1280, "hq": 28, "hkv": 4, "dh": 128},
            "qwen3-8b": {"n": 1280, "hq": 32, "hkv": 8, "dh": 128},
        },
        {"n": 90, "hq": 4, "hkv": 2, "dh": 24},
    ),
    "attention_importance": Bench(
        attention_importance,
        {
            "clip-l-336": {"h": 16, "n": 576, "dh": 64},
            "siglip-384": {"h": 16, "n": 729, "dh": 72},
        },
        {"h": 2, "n": 70, "dh": 24},
    ),
    "patch_entropy": Bench(
        patch_entropy,
        {"clip-l-336": {"side": 336, "patch": 14}, "siglip-384": {"side": 384, "patch": 14}},
        {"side": 30, "patch": 7},
    ),
    "recycle": Bench(
        recycle,
        {"llava-1.5-7b": {"side": 24, "d": 4096}, "qwen2-7b": {"side": 27, "d": 3584}},
        {"side": 7, "d": 40},
    ),
    "lag_scores": Bench(
        lag_scores,
        {name: {**sizes, "lag": 128} for name, sizes in CACHES.items()},
        {"h": 2, "n": 60, "d": 24, "lag": 16},
    ),
    "lag_keep": Bench(
        lag_keep,
        {
            "llava-1.5-7b": {"h": 32, "p": 31, "lag": 128},
            "qwen3-8b": {"h": 8, "p": 31, "lag": 128},
            "one partition": {"h": 8, "p": 1, "lag": 128},
        },
        {"h": 2, "p": 2, "lag": 24},
    ),
    "lag_compact": Bench(lag_compact, CACHES, {"h": 2, "n": 70, "d": 12}),
    "channel_scores": Bench(
        channel_scores,
        {
            "llava-1.5-7b": {"hq": 32, **CACHES["llava-1.5-7b"]},
            "qwen2-7b": {"hq": 28, **CACHES["qwen2-7b"]},
            "qwen3-8b": {"hq": 32, **CACHES["qwen3-8b"]},
        },
        {"hq": 4, "h": 2, "n": 60, "d": 24},
    ),
    "packed_decode_attention": Bench(
        packed_decode_attention,
        {
            "qwen2-7b, 1 row": {"requests": 1, "hq": 28, **CACHES["qwen2-7b"]},
            "qwen2-7b, 16 rows": {"requests": 16, "hq": 28, **CACHES["qwen2-7b"]},
            "qwen3-8b, 16 rows": {"requests": 16, "hq": 32, **CACHES["qwen3-8b"]},
        },
        {"requests": 2, "hq": 4, "h": 2, "n": 64, "d": 16},
    ),
}


def call_of(op: str, case: str, draw: Draw, *, is_tiny: bool = False) -> Call:
    """Return the call of one case, with the numbers of `draw`."""
    bench = BENCHES[op]
    return bench.build(draw, **{**bench.sizes[case], **(bench.tiny if is_tiny else {})})
