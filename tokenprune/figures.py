"""What the engine counts and times, as the API processes show it: the contract of both sides."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache

from pydantic import TypeAdapter

# upper bounds of the buckets of every op
BUCKET_SECONDS = (1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0)


class Op(StrEnum):
    """A timed operation of pruning; the value is its label on the metrics page."""

    IMAGE_IMPORTANCE = "image_importance"
    OBSERVE = "observe"
    INSTRUCTION_ATTENTION = "instruction_attention"
    SELECT = "select"
    GATHER = "gather"
    SCATTER = "scatter"
    KV_SELECT = "kv_select"
    KV_COMPACT = "kv_compact"
    CHANNEL_SELECT = "channel_select"
    CHANNEL_PACK = "channel_pack"


@dataclass(frozen=True, slots=True)
class OpTimes:
    """Calls of one operation.

    Attributes:
        count: Calls.
        seconds: Their sum.
        buckets: Per bound of `BUCKET_SECONDS`, the calls that took no longer.
    """

    count: int = 0
    seconds: float = 0.0
    buckets: tuple[int, ...] = (0,) * len(BUCKET_SECONDS)

    def __add__(self, other: OpTimes) -> OpTimes:
        buckets = tuple(a + b for a, b in zip(self.buckets, other.buckets, strict=True))
        return OpTimes(self.count + other.count, self.seconds + other.seconds, buckets)


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """Visual tokens of prompts that reached the engine, and those that survived the last cut."""

    seen: int = 0
    kept: int = 0

    def __add__(self, other: VisualTokens) -> VisualTokens:
        return VisualTokens(self.seen + other.seen, self.kept + other.kept)


@dataclass(frozen=True, slots=True)
class KVTokens:
    """KV slots that requests wrote and gave up, as the mean over the layers."""

    written: float = 0.0
    evicted: float = 0.0

    def __add__(self, other: KVTokens) -> KVTokens:
        return KVTokens(self.written + other.written, self.evicted + other.evicted)


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """Figures of one engine. Bytes are those of now; the others count since its start.

    Tensor-parallel ranks see the same tokens, so one worker speaks for its engine.

    Attributes:
        ops: By operation; those that never ran may be missing.
        visual_tokens: By visual method.
        kv_tokens: By KV method.
        kv_blocks_freed: Blocks given back by running requests, by what emptied them, such as
            `lagkv` or `lagkv+think`.
        failures: Calls of a policy that failed, by its axis and method, such as `kv/lagkv`.
        kv_bytes_saved: Bytes, over all ranks, that running requests do without.
    """

    ops: dict[Op, OpTimes] = field(default_factory=dict)
    visual_tokens: dict[str, VisualTokens] = field(default_factory=dict)
    kv_tokens: dict[str, KVTokens] = field(default_factory=dict)
    kv_blocks_freed: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    kv_bytes_saved: int = 0

    def to_json(self) -> str:
        """Return all figures as text."""
        return _adapter().dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> WorkerFigures:
        """Return the figures that `to_json` wrote."""
        return _adapter().validate_json(text)


@cache
def _adapter() -> TypeAdapter[WorkerFigures]:
    return TypeAdapter(WorkerFigures)
