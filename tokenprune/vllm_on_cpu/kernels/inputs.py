"""Input preparation: token ids, positions and lengths of a step, and the update after it."""

import numpy as np
from torch import Tensor


def prepare_prefill_inputs(
    input_ids_ptr: Tensor,
    next_prefill_tokens_ptr: Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Copy each prefilling request's chunk of the prompt, and note the tokens after it."""
    req_idx = idx_mapping_ptr.numpy()
    prefill_lens = prefill_lens_ptr.numpy()[req_idx]
    num_computed = num_computed_tokens_ptr.numpy()[req_idx]
    prefilling = np.flatnonzero(num_computed < prefill_lens)
    if not prefilling.size:
        return
    input_ids, all_token_ids = input_ids_ptr.numpy(), all_token_ids_ptr.numpy()
    next_tokens, starts = next_prefill_tokens_ptr.numpy(), query_start_loc_ptr.numpy()
    for i in prefilling:
        start, end, computed = starts[i], starts[i + 1], num_computed[i]
        row, chunk_end = all_token_ids[req_idx[i]], computed + end - start
        input_ids[start:end] = row[computed:chunk_end]
        ahead = row[chunk_end : min(chunk_end + num_lookahead, prefill_lens[i])]
        next_tokens[:, req_idx[i]] = 0
        next_tokens[: len(ahead), req_idx[i]] = ahead


def prepare_pos_seq_lens(
    pos_ptr: Tensor,
    seq_lens_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Write positions and sequence lengths; lengths past the batch are 0."""
    num_reqs = idx_mapping_ptr.shape[0]
    starts = query_start_loc_ptr.numpy()[: num_reqs + 1]
    query_lens = np.diff(starts)
    num_computed = num_computed_tokens_ptr.numpy()[idx_mapping_ptr.numpy()]
    seq_lens = seq_lens_ptr.numpy()
    seq_lens[:num_reqs] = num_computed + query_lens
    seq_lens[num_reqs:max_num_reqs] = 0
    tokens = np.arange(starts[0], starts[-1])
    pos_ptr.numpy()[starts[0] : starts[-1]] = tokens + np.repeat(
        num_computed - starts[:-1], query_lens
    )


def prepare_rope_positions(
    positions_ptr: Tensor,
    positions_stride: int,
    prefill_positions_ptr: Tensor,
    prefill_positions_stride0: int,
    prefill_positions_stride1: int,
    prefill_delta_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    prefill_lens_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    BLOCK_SIZE: int,
    NUM_DIMS: int,
) -> None:
    """Write M-RoPE positions: read back for the prompt, counted on from it afterwards."""
    positions, starts = positions_ptr.numpy(), query_start_loc_ptr.numpy()
    prefill_positions = prefill_positions_ptr.view(-1, NUM_DIMS, prefill_positions_stride1).numpy()
    prefill_lens, num_computed = prefill_lens_ptr.numpy(), num_computed_tokens_ptr.numpy()
    delta = prefill_delta_ptr.numpy()
    for i, req in enumerate(idx_mapping_ptr.tolist()):
        start, end, first = starts[i], starts[i + 1], num_computed[req]
        last = first + end - start
        if first < prefill_lens[req]:
            positions[:, start:end] = prefill_positions[req, :, first:last]
        else:
            positions[:, start:end] = np.arange(first, last) + delta[req]


def combine_sampled_and_draft_tokens(
    input_ids_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    prefill_len_ptr: Tensor,
    draft_tokens_ptr: Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: Tensor,
    logits_indices_ptr: Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """Feed the last sampled token (and drafts) back in, and list the rows that give logits."""
    num_reqs = idx_mapping_ptr.shape[0]
    req_idx = idx_mapping_ptr.numpy()
    cu_num_logits = cu_num_logits_ptr.numpy()[: num_reqs + 1]
    num_logits = np.diff(cu_num_logits)
    query_ends = query_start_loc_ptr.numpy()[1 : num_reqs + 1]
    logits_starts = query_ends - num_logits
    logits = np.arange(cu_num_logits[0], cu_num_logits[-1])
    logits_indices_ptr.numpy()[cu_num_logits[0] : cu_num_logits[-1]] = logits + np.repeat(
        logits_starts - cu_num_logits[:-1], num_logits
    )
    input_ids = input_ids_ptr.numpy()
    seq_lens, prefill_lens = seq_lens_ptr.numpy()[:num_reqs], prefill_len_ptr.numpy()[req_idx]
    is_decoding = seq_lens > prefill_lens
    if NUM_NEW_SAMPLED_TOKENS > 0:
        takes_last = is_decoding & (seq_lens - num_logits >= prefill_lens)
        last_sampled = last_sampled_tokens_ptr.view(-1).numpy()
        input_ids[logits_starts[takes_last]] = last_sampled[req_idx[takes_last]]
    num_drafts = num_logits - NUM_NEW_SAMPLED_TOKENS
    for i in np.flatnonzero(is_decoding & (num_drafts > 0)):
        drafts = draft_tokens_ptr.numpy()[req_idx[i], : num_drafts[i]]
        input_ids[query_ends[i] - num_drafts[i] : query_ends[i]] = drafts


def get_num_sampled_and_rejected(
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    seq_lens_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    prefill_len_ptr: Tensor,
) -> None:
    """Count sampled and rejected tokens: none of either in the middle of a prompt."""
    num_reqs = idx_mapping_ptr.shape[0]
    prefill_lens = prefill_len_ptr.numpy()[idx_mapping_ptr.numpy()]
    is_chunked = seq_lens_ptr.numpy()[:num_reqs] < prefill_lens
    num_sampled = num_sampled_ptr.numpy()[:num_reqs]
    num_sampled[is_chunked] = 0
    num_logits = np.diff(cu_num_logits_ptr.numpy()[: num_reqs + 1])
    num_rejected_ptr.numpy()[:num_reqs] = np.where(is_chunked, 0, num_logits - num_sampled)


def post_update(
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    output_bin_counts_ptr: Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    query_start_loc_ptr: Tensor | None,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
    num_warps: int = 1,
) -> None:
    """Append the sampled tokens to their requests and advance the counters."""
    num_reqs = idx_mapping_ptr.shape[0]
    rows = np.flatnonzero(idx_mapping_ptr.numpy() >= 0)
    req_idx = idx_mapping_ptr.numpy()[rows]
    num_sampled = num_sampled_ptr.numpy()[rows]
    sampled_tokens, total_len = sampled_tokens_ptr.numpy(), total_len_ptr.numpy()
    last_sampled, all_token_ids = (
        last_sampled_tokens_ptr.view(-1).numpy(),
        all_token_ids_ptr.numpy(),
    )
    for i in range(num_sampled.max(initial=0)):
        has_token = num_sampled > i
        requests, tokens = req_idx[has_token], sampled_tokens[rows[has_token], i]
        last_sampled[requests] = tokens
        all_token_ids[requests, total_len[requests]] = tokens
        total_len[requests] += 1
        if output_bin_counts_ptr is not None:
            output_bin_counts_ptr.numpy()[requests, tokens] += 1
    delta = -num_rejected_ptr.numpy()[rows]
    if query_start_loc_ptr is not None:
        delta += np.diff(query_start_loc_ptr.numpy()[: num_reqs + 1])[rows]
    num_computed_tokens_ptr.numpy()[req_idx] += delta
