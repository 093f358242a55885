"""How the worker's figures reach the API processes: with what travels there after each step.

    worker     Reporter  puts them on the model runner's output as an attribute
    scheduler  Relay     moves them to vLLM's scheduler stats, for every API process
    API        listen    takes them out again, before vLLM's own loggers see the stats

Nobody asks and nobody waits, so a scrape cannot disturb a step. Decision 11 has what else was
tried.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import AsyncModelRunnerOutput

from tokenprune.figures import WorkerFigures

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.outputs import ModelRunnerOutput

# attribute added to ModelRunnerOutput: the figures of `WorkerFigures`
FIGURES = "tokenprune"

# Stats are decoded by type, which drops what vLLM does not know. Of the fields that remain, this
# is the one whose unknown keys all of vLLM's loggers leave alone; its values are counts of
# requests, so the figures are in the key and the value is 0.
_CARRIER = "num_kv_fetch_reqs_by_stage"
_KEY = "tokenprune"

# a busy engine reports no more often than this
_INTERVAL_SECONDS = 0.25


class Reporter:
    """Puts a worker's figures on its outputs, as often as somebody may want to look.

    The step without tokens that vLLM runs after the last request always gets them: what is on
    the page of an idle engine is complete.
    """

    def __init__(self, figures: Callable[[], WorkerFigures]) -> None:
        self._figures = figures
        self._sent = WorkerFigures()
        self._looked_at = -_INTERVAL_SECONDS

    def after_tokens(self, output: Any) -> Any:
        """Return the output of a step with tokens, with figures if it is time for them."""
        now = monotonic()
        if output is None or now - self._looked_at < _INTERVAL_SECONDS:
            return output
        self._looked_at = now
        target = output
        if isinstance(output, AsyncModelRunnerOutput):
            target = output.model_runner_output
        self._put(target)
        return output

    def without_tokens(self, output: Any) -> Any:
        """Return the output of a step that only took requests away, with figures."""
        # vLLM returns one and the same empty output every time
        output = copy.copy(output)
        self._put(output)
        return output

    def _put(self, output: Any) -> None:
        figures = self._figures()
        if figures != self._sent:
            self._sent = figures
            setattr(output, FIGURES, figures)


class Relay:
    """Hands the figures on to all API processes; vLLM's own stats go to one of them."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        parallel = vllm_config.parallel_config
        self._engine = parallel.data_parallel_index
        # an engine started apart from the API processes learns of them by their requests
        self._clients = set(range(parallel._api_process_count))

    def hand_on(self, output: ModelRunnerOutput, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Add the figures on `output`, if any, to what goes to the API processes."""
        self._clients.update(outputs)
        figures: WorkerFigures | None = getattr(output, FIGURES, None)
        if figures is None:
            return
        key = f"{_KEY}:{self._engine}:{figures.to_json()}"
        stats = next((o.scheduler_stats for o in outputs.values() if o.scheduler_stats), None)
        for client in self._clients:
            to_client = outputs.setdefault(client, EngineCoreOutputs())
            if to_client.scheduler_stats is None:
                to_client.scheduler_stats = _state_of(stats)
            getattr(to_client.scheduler_stats, _CARRIER)[key] = 0


def _state_of(stats: SchedulerStats | None) -> SchedulerStats:
    """Return stats for a further API process: the state is the same, events happened once."""
    if stats is None:
        # statistics are switched off, and nobody reads these
        return SchedulerStats()
    return SchedulerStats(
        num_running_reqs=stats.num_running_reqs,
        num_waiting_reqs=stats.num_waiting_reqs,
        num_skipped_waiting_reqs=stats.num_skipped_waiting_reqs,
        num_kv_fetch_reqs_by_stage=dict(stats.num_kv_fetch_reqs_by_stage),
        kv_cache_usage=stats.kv_cache_usage,
    )


def listen(output_processor: Any, take: Callable[[int, str], None]) -> None:
    """Call `take` with an engine's index and its figures as text, whenever some arrive.

    Args:
        output_processor: vLLM's, of this API process. It is told of all stats, also where
            `--disable-log-stats` leaves no logger to tell.
        take: Must not raise: it runs where answers are handed to their requests.
    """
    update = output_processor.update_scheduler_stats

    def update_and_take(stats: SchedulerStats | None) -> None:
        carried = {} if stats is None else getattr(stats, _CARRIER)
        for key in [key for key in carried if key.startswith(f"{_KEY}:")]:
            del carried[key]
            _, engine, figures = key.split(":", 2)
            take(int(engine), figures)
        update(stats)

    output_processor.update_scheduler_stats = update_and_take
