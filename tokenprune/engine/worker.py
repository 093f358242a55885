"""The worker: builds our runner, and answers the API process's questions."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from vllm.platforms import current_platform

from tokenprune.engine.compat import check_version
from tokenprune.engine.config import check_supported

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class PruningWorker(PlatformWorker):
    """The platform's worker with our model runner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_version()
        check_supported(self.vllm_config)

    def init_device(self) -> None:
        """Initialise the device and build our runner."""
        if not current_platform.is_cpu():
            super().init_device()
            return
        from tokenprune.engine import cpu_kernels
        from tokenprune.engine.runner import CPUPruningModelRunner

        cpu_kernels.register()
        # CPUWorker imports its runner inside init_device and offers no other way in; this is the
        # one vLLM symbol we replace, and only while this call runs
        with patch("vllm.v1.worker.cpu.model_runner.CPUModelRunner", CPUPruningModelRunner):
            super().init_device()

    def _make_model_runner(self) -> Any:
        from tokenprune.engine.runner import PruningModelRunner

        return PruningModelRunner(self.vllm_config, self.device)

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
