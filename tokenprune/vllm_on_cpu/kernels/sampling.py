"""Sampling by Gumbel noise, with the same random numbers as the kernel, and log-probabilities."""

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_UInt32 = NDArray[np.uint32]
_HIGH_WORD_DOMAIN = 0x9E3779B9
_ROWS_PER_CHUNK = 64


def gumbel_sample(
    local_argmax_ptr: Tensor,
    local_argmax_stride: int,
    local_max_ptr: Tensor,
    local_max_stride: int,
    logits_cache_ptr: Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: Tensor | None,
    logits_cache_source_ptr: Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    seeds_ptr: Tensor,
    pos_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    """Write the best token of each block of the vocabulary, and its noisy logit.

    Rows with temperature 0 get no noise.
    """
    if IS_DRAFTING or logits_cache_ptr is not None:
        raise NotImplementedError(
            "speculative decoding must be off with the CPU kernels, got a drafting step; "
            "leave out speculative_config"
        )
    req_idx = expanded_idx_mapping_ptr.numpy()
    is_real = req_idx >= 0
    temperatures = np.where(is_real, temp_ptr.numpy()[req_idx], 0).astype(np.float32)
    seeds, positions = seeds_ptr.numpy()[req_idx], pos_ptr.numpy()
    num_blocks = local_max_ptr.shape[1]
    best_tokens, best_values = local_argmax_ptr.numpy(), local_max_ptr.numpy()
    block_starts = np.arange(num_blocks) * BLOCK_SIZE
    padded = np.full(num_blocks * BLOCK_SIZE, -np.inf, best_values.dtype)
    for i, logits in enumerate(logits_ptr.float().numpy()):
        temp = temperatures[i]
        if temp == 0:
            padded[:vocab_size] = logits
        else:
            if APPLY_TEMPERATURE:
                logits = logits / temp
            noise = _gumbel_noise(int(seeds[i]), int(positions[i]), vocab_size, USE_FP64)
            np.add(logits, noise, out=padded[:vocab_size])
        blocks = padded.reshape(num_blocks, BLOCK_SIZE)
        best = blocks.argmax(axis=1)
        best_tokens[i] = block_starts + best
        best_values[i] = blocks[np.arange(num_blocks), best]


def _gumbel_noise(seed: int, pos: int, vocab_size: int, use_fp64: bool) -> NDArray[Any]:
    low = _murmur3(seed, pos, vocab_size)
    if use_fp64:
        high = _murmur3(seed, pos, vocab_size, _HIGH_WORD_DOMAIN).astype(np.uint64)
        random53 = ((high << np.uint64(32)) | low) >> np.uint64(11)
        wide = (random53.astype(np.float64) + 0.5) * 2.0**-53
        wide[wide == 1] -= 2.0**-53
        return -np.log(-np.log(wide))
    uniform = (low >> 16).astype(np.float32) * np.float32(2.0**-16)
    uniform += ((low & 0xFFFF).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    return -np.log(-_log_one_minus(uniform))


def _log_one_minus(value: NDArray[np.float32]) -> NDArray[np.float32]:
    # the kernel's series and its switch at 0.25: any other logarithm moves the last bits
    result = np.log(np.maximum(1 - value, np.float32(2.0**-24)))
    is_small = value < 0.25
    small = value[is_small]
    polynomial = np.full_like(small, 1 / 8)
    for divisor in range(7, 0, -1):
        polynomial = np.float32(1 / divisor) + small * polynomial
    result[is_small] = -small * polynomial
    return result


def _murmur3(seed: int, pos: int, vocab_size: int, domain: int = 0) -> _UInt32:
    """Hash of seed, position and each token id, in uint32 arithmetic that wraps."""
    prefix = domain
    for key in (seed, seed >> 32, pos):
        # an array of one: numpy warns of the intended overflow for scalars only
        prefix = _mix(prefix, int(_scramble(np.array([key & 0xFFFFFFFF], np.uint32))[0]))
    h = _scrambled_token_ids(vocab_size) ^ np.uint32(prefix)
    h = _rotate_left(h, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    h ^= np.uint32(16)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _mix(h: int, scrambled_key: int) -> int:
    h ^= scrambled_key
    h = (h << 13 | h >> 19) & 0xFFFFFFFF
    return (h * 5 + 0xE6546B64) & 0xFFFFFFFF


def _scramble(key: _UInt32) -> _UInt32:
    return _rotate_left(key * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _rotate_left(value: _UInt32, shift: int) -> _UInt32:
    return (value << np.uint32(shift)) | (value >> np.uint32(32 - shift))


@functools.lru_cache(maxsize=4)
def _scrambled_token_ids(vocab_size: int) -> _UInt32:
    # the same for every row and step
    return _scramble(np.arange(vocab_size, dtype=np.uint32))


def topk_log_softmax(
    output_ptr: Tensor,
    logits_ptr: Tensor,
    logits_stride: int,
    topk_ids_ptr: Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """Log-probabilities of the listed tokens.

    Sums in the interpreter's order, block by block in float32, so that log-probs stay stock
    vLLM's to the last bit.
    """
    num_blocks = -(-vocab_size // BLOCK_SIZE)
    chunks = zip(
        torch.split(output_ptr, _ROWS_PER_CHUNK),
        torch.split(logits_ptr, _ROWS_PER_CHUNK),
        torch.split(topk_ids_ptr, _ROWS_PER_CHUNK),
        strict=True,
    )
    for output, rows, token_ids in chunks:
        logits = rows.float().numpy()
        peak = logits.max(axis=1, keepdims=True)
        terms = np.zeros((len(logits), num_blocks * BLOCK_SIZE), dtype=np.float32)
        np.exp(logits - peak, out=terms[:, :vocab_size])
        blocks = terms.reshape(len(logits), num_blocks, BLOCK_SIZE).sum(axis=2)
        total = np.zeros(len(logits), dtype=np.float32)
        for block in blocks.T:
            total += block
        chosen = np.take_along_axis(logits, token_ids.numpy(), axis=1)
        output.numpy()[:] = chosen - peak - np.log(total)[:, None]


def ranks(
    output_ptr: Tensor,
    logits_ptr: Tensor,
    logits_stride: int,
    token_ids_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Rank of each row's token: how many tokens are at least as likely."""
    chosen = logits_ptr.gather(1, token_ids_ptr.view(-1, 1))
    torch.sum(logits_ptr >= chosen, dim=1, out=output_ptr)


def prompt_logprobs_token_ids(
    prompt_logprobs_token_ids_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """List, for each prompt token of the step, the token that follows it."""
    starts, num_computed = query_start_loc_ptr.tolist(), num_computed_tokens_ptr.numpy()
    target = prompt_logprobs_token_ids_ptr.numpy()
    # one flat run, as the kernel sees it: the token after a full row is its neighbour's first
    token_ids = all_token_ids_ptr.view(-1).numpy()
    for i, req in enumerate(idx_mapping_ptr.tolist()):
        first = req * all_token_ids_stride + int(num_computed[req]) + 1
        following = token_ids[first : first + starts[i + 1] - starts[i]]
        target[starts[i] : starts[i] + len(following)] = following
