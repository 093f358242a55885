"""Torch and numpy versions of the Triton kernels that every Model Runner V2 step launches.

Interpreting those kernels costs some 25 ms a step plus up to half a second for sampling. Each
function here has the parameters of the kernel it stands for and writes the same values; the
launch-only ones (strides of contiguous rows, tile sizes) are accepted and not needed.
"""

import functools
import importlib
import warnings
from typing import Any

from tokenprune.vllm_on_cpu.kernels import block_tables, inputs, logits, sampling

_WORKER = "vllm.v1.worker.gpu"
_GATHER_BLOCK_TABLES = f"{_WORKER}.block_table._gather_block_tables_kernel"
_OVERRIDES = {
    _GATHER_BLOCK_TABLES: block_tables.gather_block_tables,
    f"{_WORKER}.block_table._compute_slot_mappings_kernel": block_tables.compute_slot_mappings,
    f"{_WORKER}.buffer_utils._apply_write_kernel": block_tables.apply_write,
    f"{_WORKER}.input_batch._combine_sampled_and_draft_tokens_kernel": (
        inputs.combine_sampled_and_draft_tokens
    ),
    f"{_WORKER}.input_batch._get_num_sampled_and_rejected_kernel": (
        inputs.get_num_sampled_and_rejected
    ),
    f"{_WORKER}.input_batch._post_update_kernel": inputs.post_update,
    f"{_WORKER}.input_batch._prepare_pos_seq_lens_kernel": inputs.prepare_pos_seq_lens,
    f"{_WORKER}.input_batch._prepare_prefill_inputs_kernel": inputs.prepare_prefill_inputs,
    f"{_WORKER}.mm.rope._prepare_rope_positions_kernel": inputs.prepare_rope_positions,
    f"{_WORKER}.sample.bad_words._bad_words_kernel": logits.bad_words,
    f"{_WORKER}.sample.gumbel._gumbel_sample_kernel": sampling.gumbel_sample,
    f"{_WORKER}.sample.gumbel._temperature_kernel": logits.temperature,
    f"{_WORKER}.sample.logit_bias._bias_kernel": logits.bias,
    f"{_WORKER}.sample.logprob._ranks_kernel": sampling.ranks,
    f"{_WORKER}.sample.logprob._topk_log_softmax_kernel": sampling.topk_log_softmax,
    f"{_WORKER}.sample.min_p._min_p_kernel": logits.min_p,
    f"{_WORKER}.sample.penalties._bincount_kernel": logits.bincount,
    f"{_WORKER}.sample.penalties._penalties_kernel": logits.penalties,
    f"{_WORKER}.sample.prompt_logprob._prompt_logprobs_token_ids_kernel": (
        sampling.prompt_logprobs_token_ids
    ),
    f"{_WORKER}.structured_outputs._apply_grammar_bitmask_kernel": logits.apply_grammar_bitmask,
    # not a kernel, but its launcher: the kernel behind it fails under the interpreter
    "vllm.v1.sample.ops.topk_topp_triton.apply_top_k_top_p_triton": logits.apply_top_k_top_p,
}


@functools.cache
def register() -> None:
    """Point every launch of those kernels in this process at the functions here, once."""
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels

    for name in _OVERRIDES:
        importlib.import_module(name.rpartition(".")[0])
    # a module that copied a name before is rebound only if it is loaded by now
    importlib.import_module("vllm.v1.worker.gpu.model_runner")

    class GridOverride(KernelOverride):
        """An override that also passes the launch grid, which vLLM's own drops."""

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return functools.partial(self._impl, grid)

    with warnings.catch_warnings():
        # the search for copies touches deprecated attributes of every loaded module
        warnings.simplefilter("ignore")
        register_kernels(_OVERRIDES)
    module_name, _, attribute = _GATHER_BLOCK_TABLES.rpartition(".")
    module = importlib.import_module(module_name)
    override = GridOverride(getattr(module, attribute), _OVERRIDES[_GATHER_BLOCK_TABLES])
    setattr(module, attribute, override)
