"""The worker's counters, and timings by events that the device passes in its own time."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from tokenprune.engine.stats import WorkerStats
from tokenprune.figures import BUCKET_SECONDS, KVTokens, Op, VisualTokens


class Event:
    """An event of a stream that has got as far as `passed`."""

    made: list["Event"]
    passed: int
    queries: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.place = len(Event.made)
        Event.made.append(self)

    def record(self) -> None:
        pass

    def query(self) -> bool:
        Event.queries += 1
        return self.place < Event.passed

    def elapsed_time(self, end: "Event") -> float:
        return float(end.place - self.place)

    def synchronize(self) -> None:
        raise AssertionError("nothing may wait for the device")


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch) -> WorkerStats:
    Event.made, Event.passed, Event.queries = [], 0, 0
    monkeypatch.setattr(torch, "Event", Event)
    return WorkerStats(torch.device("cuda"), num_layers=2)


def calls(stats: WorkerStats, op: Op = Op.GATHER) -> int:
    times = stats.figures().ops.get(op)
    return 0 if times is None else times.count


def test_a_device_far_behind_costs_one_question_a_call(stats: WorkerStats) -> None:
    for _ in range(10_000):
        with stats.time(Op.GATHER):
            pass
    assert Event.queries == 10_000
    assert calls(stats) == 0
    assert Event.queries == 10_001


def test_timings_are_read_as_far_as_the_device_has_come(stats: WorkerStats) -> None:
    for _ in range(5):
        with stats.time(Op.GATHER):
            pass
    # the third call's end is passed, the fourth's begin alone
    Event.passed = 7
    assert calls(stats) == 3
    Event.passed = 10
    assert calls(stats) == 5


def test_a_device_that_keeps_pace_leaves_nothing_to_read_later(stats: WorkerStats) -> None:
    for _ in range(100):
        with stats.time(Op.GATHER):
            pass
    Event.passed = 10**9
    for _ in range(100):
        with stats.time(Op.SCATTER):
            pass
    before = Event.queries
    assert (calls(stats), calls(stats, Op.SCATTER)) == (100, 100)
    assert Event.queries == before


def test_buckets_count_what_took_no_longer() -> None:
    stats = WorkerStats(torch.device("cpu"), num_layers=2)
    # a bound itself, one between two bounds, and one past the last
    for seconds in (BUCKET_SECONDS[3], 0.02, 5.0):
        stats._observe(Op.SELECT, seconds)
    times = stats.figures().ops[Op.SELECT]
    assert times.buckets == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
    assert times.count == 3
    assert times.seconds == pytest.approx(5.0205)


def test_tokens_are_counted_by_method_and_as_the_mean_over_layers() -> None:
    stats = WorkerStats(torch.device("cpu"), num_layers=4)
    for _ in range(2):
        stats.count_visual("uniform", 100, 25)
        stats.count_kv("lagkv", 40, 10)
        stats.count_freed("lagkv", 3)
    before = stats.figures(kv_bytes_saved=7)
    stats.count_visual("random", 1, 1)
    assert before.visual_tokens == {"uniform": VisualTokens(200, 50)}
    assert before.kv_tokens == {"lagkv": KVTokens(20.0, 5.0)}
    assert before.kv_blocks_freed == {"lagkv": 6}
    assert before.kv_bytes_saved == 7
