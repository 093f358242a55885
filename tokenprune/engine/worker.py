"""The worker: builds our runner, and answers the API process's questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from tokenprune.engine.compat import check_version
from tokenprune.engine.config import check_supported
from tokenprune.engine.last_hidden import LastHiddenRecorder

if TYPE_CHECKING:
    from types import ModuleType

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_version()
        check_supported(self.vllm_config)
        self._last_hidden: LastHiddenRecorder | None = None

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
        """Run a step, and record hidden states if somebody asked for them."""
        result = super().execute_model(scheduler_output)
        if self._last_hidden is not None:
            self._last_hidden.observe(scheduler_output, self.model_runner.execute_model_state)
        return result

    def tokenprune_record_last_hidden(self) -> None:
        """Record the last hidden state of prompts that ask for it from now on."""
        self._last_hidden = LastHiddenRecorder()

    def tokenprune_take_last_hidden(self) -> list[dict[str, Any]]:
        """Return what was recorded since the last call."""
        assert self._last_hidden is not None, "recording must be switched on first"
        return self._last_hidden.take()

    def tokenprune_kv_unsupported(self) -> str | None:
        """Return why KV tokens cannot be evicted in this worker, or None if they can."""
        return self.model_runner.kv_unsupported

    def tokenprune_channels(self) -> tuple[str | None, int]:
        """Return why KV channels cannot be pruned in this worker, or None; and slots of a block."""
        runner = self.model_runner
        spec = runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec
        return runner.channels_unsupported, spec.block_size

    def tokenprune_stats(self) -> dict[str, Any]:
        """Return this worker's figures since the engine started, as plain data."""
        runner = self.model_runner
        return {**runner.stats.snapshot(), "kv_bytes_saved": runner.kv_bytes_saved()}
