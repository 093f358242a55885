"""The worker: builds our runner, reports its figures, and answers questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from tokenprune.engine.compat import check_version
from tokenprune.engine.hidden_recorder import HiddenRecorder
from tokenprune.engine.reporting import Reporter
from tokenprune.engine.startup import check_supported, why_stock
from tokenprune.figures import WorkerFigures
from tokenprune.shape import Feature

if TYPE_CHECKING:
    from types import ModuleType

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Give `module` another attribute `name` for the length of a `with` block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


class PruningWorker(PlatformWorker):
    """The platform's worker with our model runner."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        """Make vLLM's own worker where nothing can be pruned."""
        check_version()
        check_supported(vllm_config)
        if why_stock(vllm_config) is not None:
            return PlatformWorker(vllm_config, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last_hidden: HiddenRecorder | None = None
        self._reporter = Reporter(self._figures)

    def init_device(self) -> None:
        """Initialise the device and build our runner."""
        if not current_platform.is_cpu():
            super().init_device()
            return
        from vllm.v1.worker.cpu import model_runner

        from tokenprune.engine.runner import CPUPruningModelRunner
        from tokenprune.vllm_on_cpu import kernels as cpu_kernels

        cpu_kernels.register()
        # CPUWorker imports its runner inside init_device and offers no other way in; this is the
        # one vLLM symbol we replace, and only while this call runs
        with replaced(model_runner, "CPUModelRunner", CPUPruningModelRunner):
            super().init_device()

    def _make_model_runner(self) -> Any:
        from tokenprune.engine.runner import PruningModelRunner

        return PruningModelRunner(self.vllm_config, self.device)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run a step, record hidden states if somebody asked for them, and report figures."""
        result = super().execute_model(scheduler_output)
        if self._last_hidden is not None:
            self._last_hidden.observe(scheduler_output, self.model_runner.execute_model_state)
        if self.is_driver_worker and scheduler_output.total_num_scheduled_tokens == 0:
            return self._reporter.without_tokens(result)
        return result

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample the step's tokens, and report figures."""
        result = super().sample_tokens(grammar_output)
        return self._reporter.after_tokens(result) if self.is_driver_worker else result

    def tokenprune_record_last_hidden(self) -> None:
        """Record the last hidden state of prompts that ask for it from now on."""
        self._last_hidden = HiddenRecorder()

    def tokenprune_take_last_hidden(self) -> list[dict[str, Any]]:
        """Return what was recorded since the last call."""
        assert self._last_hidden is not None, "recording must be switched on first"
        return self._last_hidden.take()

    def tokenprune_shape(self) -> tuple[dict[Feature, str], int]:
        """Return why features cannot be had in this worker, and slots of a block.

        The attention backend, which decides both, is chosen in the workers.
        """
        shape = self.model_runner.shape
        return dict(shape.unsupported), shape.block_size

    def tokenprune_stats(self) -> dict[str, Any]:
        """Return the figures as plain data, for callers that have no metrics page."""
        return asdict(self._figures())

    def _figures(self) -> WorkerFigures:
        runner = self.model_runner
        # each rank holds as many blocks as this one, for its own heads
        ranks = self.parallel_config.tensor_parallel_size
        return runner.stats.figures(runner.kv_bytes_saved() * ranks)
