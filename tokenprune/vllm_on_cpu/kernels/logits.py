"""Logits processing: biases, penalties, temperature and the masks before sampling.

vLLM hands these kernels a float32 copy of the logits, `[B, vocab]`, changed in place.
"""

import itertools

import numpy as np
import torch
from torch import Tensor


def temperature(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    temperature_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Divide by each request's temperature; 0 (greedy) leaves the row alone."""
    scale = temperature_ptr[expanded_idx_mapping_ptr].float()
    logits_ptr.div_(scale.masked_fill_(scale == 0, 1).unsqueeze(1))


def min_p(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    min_p_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Drop tokens less likely than `min_p` times the most likely one."""
    min_ps = min_p_ptr.numpy()[expanded_idx_mapping_ptr.numpy()]
    for row, value in zip(logits_ptr.numpy(), min_ps, strict=True):
        if value != 0:
            row[row < row.max() + np.log(value)] = -np.inf


def penalties(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    token_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    repetition_penalty_ptr: Tensor,
    frequency_penalty_ptr: Tensor,
    presence_penalty_ptr: Tensor,
    prompt_bin_mask_ptr: Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: Tensor,
    output_bin_counts_stride: int,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Apply repetition, frequency and presence penalties."""
    req_idx, local_pos = expanded_idx_mapping_ptr.numpy(), expanded_local_pos_ptr.numpy()
    for i, row in enumerate(logits_ptr.numpy()):
        req = req_idx[i]
        repetition = repetition_penalty_ptr.numpy()[req]
        frequency = frequency_penalty_ptr.numpy()[req]
        presence = presence_penalty_ptr.numpy()[req]
        if repetition == 1 and frequency == 0 and presence == 0:
            continue
        counts = output_bin_counts_ptr.numpy()[req, :vocab_size].astype(np.float32)
        # tokens drafted before this position count as output
        first_draft = i - local_pos[i] + 1
        np.add.at(counts, token_ids_ptr.numpy()[first_draft : i + 1], 1)
        is_output = counts > 0
        if repetition != 1:
            packed = prompt_bin_mask_ptr.numpy()[req].view(np.uint8)
            is_prompt = np.unpackbits(packed, count=vocab_size, bitorder="little").view(bool)
            one = np.float32(1)
            scale = np.where(is_prompt | is_output, repetition, one)
            row *= np.where(row > 0, one / scale, scale)
        row -= frequency * counts
        row -= presence * is_output


def bincount(
    expanded_idx_mapping_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: Tensor,
    prefill_len_ptr: Tensor,
    prompt_bin_mask_ptr: Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: Tensor,
    output_bin_counts_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """Record which tokens a new request's prompt has, and count those it has put out."""
    masks, counts = prompt_bin_mask_ptr.numpy(), output_bin_counts_ptr.numpy()
    for req in expanded_idx_mapping_ptr.tolist():
        tokens = all_token_ids_ptr.numpy()[req]
        prompt_len, prefill_len = int(prompt_len_ptr[req]), int(prefill_len_ptr[req])
        is_prompt = np.zeros(32 * masks.shape[1], bool)
        is_prompt[tokens[:prompt_len]] = True
        masks[req] |= np.packbits(is_prompt, bitorder="little").view(np.int32)
        np.add.at(counts[req], tokens[prompt_len:prefill_len], 1)


def bias(
    logits_ptr: Tensor,
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: Tensor,
    num_allowed_token_ids_ptr: Tensor,
    allowed_token_ids_ptr: Tensor,
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: Tensor,
    bias_token_ids_ptr: Tensor,
    bias_token_ids_stride: int,
    bias_ptr: Tensor,
    bias_stride: int,
    pos_ptr: Tensor,
    min_lens_ptr: Tensor,
    num_stop_token_ids_ptr: Tensor,
    restore_when_all_masked_ptr: Tensor,
    stop_token_ids_ptr: Tensor,
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
) -> None:
    """Keep allowed tokens only, add biases, and forbid stop tokens before the minimum length."""
    pos = pos_ptr.numpy()
    for i, req in enumerate(expanded_idx_mapping_ptr.tolist()):
        row = logits_ptr.numpy()[i]
        if num_allowed := int(num_allowed_token_ids_ptr[req]):
            allowed = allowed_token_ids_ptr.numpy()[req, :num_allowed]
            kept = row[allowed]
            row[:vocab_size] = -np.inf
            row[allowed] = kept
        if num_bias := int(num_logit_bias_ptr[req]):
            row[bias_token_ids_ptr.numpy()[req, :num_bias]] += bias_ptr.numpy()[req, :num_bias]
        num_stop = int(num_stop_token_ids_ptr[req])
        if num_stop and pos[i] + 1 < int(min_lens_ptr[req]):
            stop = stop_token_ids_ptr.numpy()[req, :num_stop]
            kept = row[stop]
            row[stop] = -np.inf
            # a grammar may have left nothing but the stop tokens
            can_restore = CHECK_ALL_MASKED_ROWS and bool(restore_when_all_masked_ptr[req])
            if can_restore and row[:vocab_size].max() == -np.inf:
                row[stop] = np.where(np.isfinite(kept), kept, -np.inf)


def bad_words(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    bad_word_token_ids_ptr: Tensor,
    bad_word_token_ids_stride: int,
    bad_word_offsets_ptr: Tensor,
    bad_word_offsets_stride: int,
    num_bad_words_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: Tensor,
    total_len_ptr: Tensor,
    input_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
) -> None:
    """Forbid the last token of each bad word whose first tokens were just put out."""
    local_pos = expanded_local_pos_ptr.tolist()
    for i, req in enumerate(expanded_idx_mapping_ptr.tolist()):
        num_words = int(num_bad_words_ptr[req])
        offsets = bad_word_offsets_ptr[req, : num_words + 1].tolist()
        tokens = bad_word_token_ids_ptr[req].numpy()
        output = np.concatenate(
            [
                all_token_ids_ptr.numpy()[req, int(prompt_len_ptr[req]) : int(total_len_ptr[req])],
                input_ids_ptr.numpy()[i - local_pos[i] + 1 : i + 1],
            ]
        )
        for start, end in itertools.pairwise(offsets):
            prefix = tokens[start : end - 1]
            # a prefix longer than the output differs from it in length
            if np.array_equal(output[max(len(output) - len(prefix), 0) :], prefix):
                logits_ptr[i, tokens[end - 1]] = -torch.inf


def apply_grammar_bitmask(
    logits_ptr: Tensor,
    logits_stride: int,
    logits_indices_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    bitmask_ptr: Tensor,
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    """Forbid the tokens that a request's grammar does not accept next."""
    cu_num_logits = cu_num_logits_ptr.tolist()
    for mapping_idx, packed in zip(logits_indices_ptr.tolist(), bitmask_ptr.numpy(), strict=True):
        req, position = divmod(mapping_idx, MASK_STRIDE)
        row = cu_num_logits[req] + position
        if row < cu_num_logits[req + 1]:
            bits = np.unpackbits(packed.view(np.uint8), count=vocab_size, bitorder="little")
            logits_ptr[row, :vocab_size][torch.from_numpy(bits == 0)] = -torch.inf


def apply_top_k_top_p(
    logits: Tensor, k: Tensor | None, p: Tensor | None, mask_value: float = -torch.inf
) -> Tensor:
    """vLLM's own torch version, which it would take if Triton were missing."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    assert mask_value == -torch.inf, "vLLM's callers leave the mask value at its default"
    return apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)
