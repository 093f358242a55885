"""The way of the worker's figures: model runner's output, scheduler stats, API process."""

import logging
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import AggregatedLoggingStatLogger, LoggingStatLogger
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tokenprune.engine import reporting
from tokenprune.engine.reporting import FIGURES, Relay, Reporter, listen
from tokenprune.figures import KVTokens, Op, OpTimes, VisualTokens, WorkerFigures

SOME = WorkerFigures(
    ops={Op.SELECT: OpTimes(2, 0.25, (1,) * 11)},
    visual_tokens={"uniform": VisualTokens(144, 36)},
    kv_tokens={"lagkv": KVTokens(7.5, 2.0)},
    kv_blocks_freed={"lagkv+think": 3},
    kv_bytes_saved=2**40,
)


def output(figures: WorkerFigures | None = None) -> ModelRunnerOutput:
    made = ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0})
    if figures is not None:
        setattr(made, FIGURES, figures)
    return made


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reporting, "monotonic", clock)
    return clock


def test_figures_survive_the_way_as_text() -> None:
    assert WorkerFigures.from_json(SOME.to_json()) == SOME


def test_a_worker_that_counted_nothing_reports_nothing() -> None:
    reporter = Reporter(WorkerFigures)
    assert not hasattr(reporter.after_tokens(output()), FIGURES)
    assert not hasattr(reporter.without_tokens(output()), FIGURES)
    assert reporter.after_tokens(None) is None


def test_a_busy_worker_counts_together_only_now_and_then(clock: Clock) -> None:
    asked = 0

    def figures() -> WorkerFigures:
        nonlocal asked
        asked += 1
        return WorkerFigures(kv_bytes_saved=asked)

    reporter = Reporter(figures)
    assert getattr(reporter.after_tokens(output()), FIGURES).kv_bytes_saved == 1
    for _ in range(100):
        clock.now += 0.001
        assert not hasattr(reporter.after_tokens(output()), FIGURES)
    assert asked == 1
    clock.now += 0.25
    assert getattr(reporter.after_tokens(output()), FIGURES).kv_bytes_saved == 2


def test_the_step_after_the_last_request_always_reports_what_changed(clock: Clock) -> None:
    figures = [SOME, WorkerFigures(), WorkerFigures()]
    reporter = Reporter(lambda: figures.pop(0))
    reporter.after_tokens(output())
    assert getattr(reporter.without_tokens(output()), FIGURES) == WorkerFigures()
    assert not hasattr(reporter.without_tokens(output()), FIGURES), "nothing changed since"


def test_the_empty_output_that_all_steps_share_stays_empty() -> None:
    assert (
        getattr(Reporter(lambda: SOME).without_tokens(EMPTY_MODEL_RUNNER_OUTPUT), FIGURES) == SOME
    )
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, FIGURES)


def test_an_output_that_is_still_being_copied_carries_them_too() -> None:
    class Copying(AsyncModelRunnerOutput):
        model_runner_output = output()

        def get_output(self) -> ModelRunnerOutput:
            return self.model_runner_output

    copying = Copying()
    assert Reporter(lambda: SOME).after_tokens(copying) is copying
    # what `get_output` returns crosses to the scheduler's process by pickle
    assert getattr(pickle.loads(pickle.dumps(copying.get_output())), FIGURES) == SOME


def relay(engine: int = 0, clients: int = 1) -> Relay:
    parallel = SimpleNamespace(data_parallel_index=engine, _api_process_count=clients)
    return Relay(SimpleNamespace(parallel_config=parallel))  # type: ignore[arg-type]


class Process:
    """An API process with vLLM's own decoder and output processor, and loggers after them."""

    def __init__(self, *, listening: bool = True, log_stats: bool = True) -> None:
        self.taken: list[tuple[int, WorkerFigures]] = []
        self.seen: list[SchedulerStats] = []
        self.processor = OutputProcessor(None, log_stats=log_stats)
        if listening:
            listen(
                self.processor,
                lambda engine, text: self.taken.append((engine, WorkerFigures.from_json(text))),
            )

    def receive(self, outputs: EngineCoreOutputs) -> None:
        frames = MsgpackEncoder().encode(outputs)
        decoded = MsgpackDecoder(EngineCoreOutputs).decode(frames)
        # as AsyncLLM's output handler does
        self.processor.update_scheduler_stats(decoded.scheduler_stats)
        if decoded.scheduler_stats is not None:
            self.seen.append(decoded.scheduler_stats)


def test_figures_reach_an_api_process_beside_the_stats() -> None:
    stats = SchedulerStats(num_running_reqs=3, num_kv_fetch_reqs_by_stage={"in_progress": 1})
    outputs = {0: EngineCoreOutputs(scheduler_stats=stats)}
    relay(engine=1).hand_on(output(SOME), outputs)
    process = Process()
    process.receive(outputs[0])
    assert process.taken == [(1, SOME)]
    # what loggers get is what vLLM made
    (seen,) = process.seen
    assert seen == SchedulerStats(num_running_reqs=3, num_kv_fetch_reqs_by_stage={"in_progress": 1})


@pytest.mark.parametrize("outputs", [{}, {0: EngineCoreOutputs()}], ids=["idle", "answers"])
def test_figures_need_no_statistics(outputs: dict[int, EngineCoreOutputs]) -> None:
    relay().hand_on(output(SOME), outputs)
    process = Process(log_stats=False)
    process.receive(outputs[0])
    assert process.taken == [(0, SOME)]


def test_a_step_without_figures_is_left_alone() -> None:
    outputs: dict[int, EngineCoreOutputs] = {}
    relay().hand_on(output(), outputs)
    assert outputs == {}


def test_every_api_process_is_told_and_events_are_told_once() -> None:
    hits = PrefixCacheStats(requests=1, queries=10, hits=5)
    stats = SchedulerStats(num_running_reqs=2, kv_cache_usage=0.5, prefix_cache_stats=hits)
    answer = EngineCoreOutput(request_id="r", new_token_ids=[1])
    outputs = {1: EngineCoreOutputs(outputs=[answer], scheduler_stats=stats)}
    relay(clients=3).hand_on(output(SOME), outputs)
    processes = [Process() for _ in range(3)]
    for index, process in enumerate(processes):
        process.receive(outputs[index])
    assert [process.taken for process in processes] == [[(0, SOME)]] * 3
    seen = [process.seen[0] for process in processes]
    assert [s.num_running_reqs for s in seen] == [2, 2, 2]
    assert [s.kv_cache_usage for s in seen] == [0.5, 0.5, 0.5]
    assert [s.prefix_cache_stats.hits for s in seen] == [0, 5, 0]


def test_an_api_process_unknown_at_the_start_is_told_once_it_has_asked_something() -> None:
    relaying = relay(clients=1)
    relaying.hand_on(output(), {2: EngineCoreOutputs()})
    outputs: dict[int, EngineCoreOutputs] = {}
    relaying.hand_on(output(SOME), outputs)
    assert set(outputs) == {0, 2}


@pytest.mark.parametrize("kind", ["one", "aggregated"])
def test_vllms_loggers_stay_calm_where_nobody_takes_the_figures_out(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = {0: EngineCoreOutputs(scheduler_stats=SchedulerStats(num_running_reqs=3))}
    relay().hand_on(output(SOME), outputs)
    process = Process(listening=False)
    process.receive(outputs[0])
    config = VllmConfig()
    logger: Any = (
        LoggingStatLogger(config) if kind == "one" else AggregatedLoggingStatLogger(config, [0])
    )
    logger.record(process.seen[0], None, engine_idx=0)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.DEBUG, "vllm"):
        logger.log()
    assert "Running: 3 reqs" in caplog.text
    assert "KV fetch" not in caplog.text
