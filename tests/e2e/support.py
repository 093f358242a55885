"""One real engine in this process, and what tests ask of it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.oracle.asks import Answer, Ask, image
from tokenprune.engine.launch import engine_arguments


class Engine:
    """vLLM in this process, so that tests see the scheduler and its block pool."""

    def __init__(self, checkpoint: Path, *, pruning: bool = True, **arguments: Any) -> None:
        from vllm import LLM

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
            defaults |= engine_arguments(
                prune_layers=arguments.pop("prune_layers", None),
                allow_channel_pruning=arguments.pop("allow_channel_pruning", False),
            )
        self.llm = LLM(str(checkpoint), **(defaults | arguments))

    @property
    def scheduler(self) -> Any:
        """The live scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def blocks_missing(self) -> int:
        """Blocks not in the pool; the null block never is."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def ask(self, *asks: Ask) -> list[Answer]:
        """Run requests together and return their answers in order."""
        return self._ask([_prompt(a) for a in asks], asks)

    def ask_with(self, ask: Ask, data: dict[str, Any]) -> list[Answer]:
        """Run a request with other data than its images."""
        return self._ask([{"prompt": ask.prompt, "multi_modal_data": data}], [ask])

    def _ask(self, prompts: list[Any], asks: Sequence[Ask]) -> list[Answer]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            prompts,
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=a.max_tokens,
                    ignore_eos=True,
                    logprobs=5,
                    extra_args=a.pruning,
                )
                for a in asks
            ],
            use_tqdm=False,
        )
        return [
            Answer(
                list(o.outputs[0].token_ids),
                [{t: p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs],
            )
            for o in outputs
        ]

    def close(self) -> None:
        """Release the engine's memory."""
        del self.llm
        gc.collect()


def _prompt(ask: Ask) -> dict[str, Any]:
    data = {"multi_modal_data": {"image": [image(s) for s in ask.images]}} if ask.images else {}
    return {"prompt": ask.prompt, **data}
