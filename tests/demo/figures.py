"""Figures of a demo that was run: pages of metrics, and the rows of both tables."""

from __future__ import annotations

from typing import Any

from tokenprune.demo.quiz import METHODS, QuizRow
from tokenprune.demo.report import SpeedRow

KEPT = [288, 180, 36, 36]
BEFORE = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="512"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.0
# TYPE tokenprune_requests_total counter
tokenprune_requests_total{channels="none",kv="none",outcome="off",visual="none"} 2.0
# TYPE tokenprune_kv_bytes_saved gauge
tokenprune_kv_bytes_saved 0.0
"""
AFTER = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="512"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.2974559686888455
# TYPE tokenprune_requests_total counter
tokenprune_requests_total{channels="none",kv="none",outcome="off",visual="none"} 3.0
tokenprune_requests_total{channels="none",kv="none",outcome="applied",visual="transprune"} 6.0
# TYPE tokenprune_requests_created gauge
tokenprune_requests_created{channels="none",kv="none",outcome="off",visual="none"} 1.7e+09
# TYPE tokenprune_prefill_flops_total counter
tokenprune_prefill_flops_total{state="full"} 5.57e+12
tokenprune_prefill_flops_total{state="spent"} 2.228e+12
# TYPE tokenprune_op_seconds histogram
tokenprune_op_seconds_bucket{le="+Inf",op="instruction_attention"} 12.0
tokenprune_op_seconds_count{op="instruction_attention"} 12.0
tokenprune_op_seconds_sum{op="instruction_attention"} 0.0271
# TYPE tokenprune_kv_bytes_saved gauge
tokenprune_kv_bytes_saved 0.0
"""


def _usage(kept: list[int] | None) -> dict[str, Any]:
    """Return the usage of a request that kept so many visual tokens a stage."""
    pruning = {"visual_tokens": 2304, "visual_tokens_kept": dict(enumerate(kept or []))}
    return {"prompt_tokens": 2333, **({"pruning": pruning} if kept is not None else {})}


def speed_rows(pruned_blocks: int = 65) -> list[SpeedRow]:
    """Return the rows of the table of speed."""
    cut = _usage([2304, 1440, 288, 288])
    return [
        SpeedRow("off", 152, _usage(None), [3.0, 9.0, 3.2], [30.0, 28.0, 29.0]),
        SpeedRow("uniform", 65, cut, [1.3, 1.2, 1.4], [31.0, 31.0, 31.0]),
        SpeedRow("transprune", pruned_blocks, cut, [1.6, 1.5, 7.0], [32.0, 33.0, 31.0]),
    ]


def quiz_rows(right: tuple[int, ...] = (46, 30, 31, 44), blocks: int = 37) -> list[QuizRow]:
    """Return the rows of the table of answers."""
    cut = {"pruning": {"visual_tokens": 288, "visual_tokens_kept": dict(enumerate(KEPT))}}
    return [
        QuizRow("off", 80, {}, [0.05, 0.04, 0.06], ["x"] * 48, right[0]),
        *(
            QuizRow(method, blocks, cut, [0.05], ["x"] * 48, number)
            for method, number in zip(METHODS, right[1:], strict=True)
        ),
    ]
