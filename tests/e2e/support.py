"""One real engine in this process, and what tests ask of it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tests.oracle.asks import Answer, Ask, image
from tokenprune.engine.launch import EngineOptions, engine_arguments

# summation order in a matrix product depends on the number of rows in the batch, also in stock
# vLLM on a CPU; this bound is far below what one wrong row does
ROUNDING = 2e-5
# an engine that must cut prompts into chunks, which hold one image and some text, and preempt
CRAMPED: dict[str, Any] = {
    "max_num_batched_tokens": 192,
    "max_model_len": 512,
    "max_num_seqs": 6,
}

# arguments of our engine; all others are vLLM's
OURS = tuple(field.name for field in fields(EngineOptions))

_count = itertools.count()


class Engine:
    """vLLM in this process, so that tests see the scheduler and its block pool.

    Attributes:
        hits: Tokens that the prefix cache brought to each of the last requests, as vLLM reports.
    """

    def __init__(self, checkpoint: Path, *, pruning: bool = True, **arguments: Any) -> None:
        self.hits: list[int] = []
        from vllm import LLM
        from vllm.distributed import parallel_state

        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_model_len": 2048,
            "max_num_batched_tokens": 2048,
            "block_size": 32,
            "limit_mm_per_prompt": {"image": 4},
            "disable_log_stats": True,
        }
        if pruning:
            ours = {name: arguments.pop(name) for name in OURS if name in arguments}
            defaults |= engine_arguments(**ours)
        # matrices this small lose more to waiting threads than they gain, many times over on a busy
        # machine; once an engine runs, vLLM refuses another number
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
            # the groups of the first engine serve all, and it may have had no experts
            parallel_state._EP = parallel_state._TP
        self.llm = LLM(str(checkpoint), **(defaults | arguments))

    @property
    def scheduler(self) -> Any:
        """The live scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def runner(self) -> Any:
        """The live model runner."""
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        return executor.driver_worker.worker.model_runner

    @property
    def groups(self) -> Any:
        """The KV cache groups, one a stage."""
        return self.scheduler.kv_cache_config.kv_cache_groups

    @property
    def blocks_missing(self) -> int:
        """Blocks not in the pool; the null block never is."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    @property
    def num_cached(self) -> int:
        """Blocks that the prefix cache knows."""
        return len(self.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)

    @property
    def is_idle(self) -> bool:
        """Whether no request runs and none has left a block, a plan or a row that waits."""
        left = self.llm.llm_engine.has_unfinished_requests() or self.scheduler._plans
        return not left and self.blocks_missing == self.rows_waiting == 0

    @property
    def rows_waiting(self) -> int:
        """Rows of prompts that wait in the worker."""
        staged = self.runner._staged
        if staged is None:
            return 0
        pool = staged._waiting.pool
        return pool.num_rows - pool.num_free

    def stats(self) -> dict[str, Any]:
        """Return what the worker has counted since it started."""
        (stats,) = self.llm.llm_engine.collective_rpc("tokenprune_stats")
        return stats

    def ask(self, *asks: Ask) -> list[Answer]:
        """Run requests together and return their answers in order."""
        return self._ask([_prompt(a) for a in asks], asks)

    def ask_with(self, ask: Ask, data: dict[str, Any]) -> list[Answer]:
        """Run a request with other data than its images."""
        return self._ask([{"prompt": ask.prompt, "multi_modal_data": data}], [ask])

    def _ask(self, prompts: list[Any], asks: Sequence[Ask]) -> list[Answer]:
        params = [_sampling(a, logprobs=5) for a in asks]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        self.hits = [o.num_cached_tokens for o in outputs]
        return [
            Answer(
                list(o.outputs[0].token_ids),
                [{t: p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs],
            )
            for o in outputs
        ]

    def forget(self) -> None:
        """Empty every cache, so that the next request meets the engine as if just started."""
        assert self.is_idle
        assert self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def close(self) -> None:
        """Release the engine's memory."""
        del self.llm
        gc.collect()


def start(engine: Engine, ask: Ask) -> str:
    """Hand over a request without running it, and return its id."""
    request_id = f"r{next(_count)}"
    engine.llm.llm_engine.add_request(request_id, _prompt(ask), _sampling(ask))
    return request_id


def internal_id(engine: Engine, request_id: str) -> str:
    """Return the id that the scheduler knows a request by."""
    return next(r for r in engine.scheduler.requests if r.startswith(request_id))


def step(engine: Engine, times: int = 1) -> None:
    """Run steps."""
    for _ in range(times):
        engine.llm.llm_engine.step()


def abort(engine: Engine, request_ids: list[str]) -> None:
    """Give up requests."""
    engine.llm.llm_engine.abort_request(request_ids)


def drain(engine: Engine) -> None:
    """Run until all requests have ended and the worker has heard of it."""
    while engine.llm.llm_engine.has_unfinished_requests():
        step(engine)
    step(engine)


@contextmanager
def preemptions(engine: Engine) -> Iterator[list[dict[str, Any] | None]]:
    """Yield a list that grows by the flat keys of each request that is preempted."""
    scheduler, seen = engine.scheduler, []
    preempt = scheduler._preempt_request

    def recorded(request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(request.sampling_params.extra_args)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = recorded
    try:
        yield seen
    finally:
        del scheduler._preempt_request


def _prompt(ask: Ask) -> dict[str, Any]:
    data = {"multi_modal_data": {"image": [image(s) for s in ask.images]}} if ask.images else {}
    return {"prompt": ask.prompt, **data}


def _sampling(ask: Ask, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=ask.max_tokens,
        ignore_eos=True,
        extra_args=ask.pruning,
        **more,
    )
