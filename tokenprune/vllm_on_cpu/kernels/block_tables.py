"""Block tables and staged writes: kernels that reach tensors through their addresses."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def _int32_at(address: int, count: int) -> NDArray[np.int32]:
    return np.frombuffer(memoryview((ctypes.c_int32 * count).from_address(address)), np.int32)


def apply_write(
    output_ptr: Tensor,
    output_stride: Any,
    write_indices_ptr: Tensor,
    write_starts_ptr: Tensor,
    write_contents_ptr: Tensor,
    write_cu_lens_ptr: Tensor,
    write_group_ids_ptr: Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Copy each staged run of values to its row, in order: a later write wins."""
    contents = write_contents_ptr.numpy()
    rows, starts = write_indices_ptr.tolist(), write_starts_ptr.tolist()
    ends = write_cu_lens_ptr.tolist()
    begins = [0, *ends[:-1]]
    if not MULTI_GROUP:
        output = output_ptr.view(-1).numpy()
        for row, start, begin, end in zip(rows, starts, begins, ends, strict=True):
            first = row * output_stride + start
            output[first : first + end - begin] = contents[begin:end]
        return
    assert write_group_ids_ptr is not None, "a multi-group write names its groups"
    addresses, strides = output_ptr.tolist(), output_stride.tolist()
    groups = write_group_ids_ptr.tolist()
    for group, row, start, begin, end in zip(groups, rows, starts, begins, ends, strict=True):
        address = addresses[group] + 4 * (row * strides[group] + start)
        _int32_at(address, end - begin)[:] = contents[begin:end]


def gather_block_tables(
    grid: tuple[int, ...],
    batch_idx_to_req_idx: Tensor,
    src_block_table_ptrs: Tensor,
    dst_block_table_ptrs: Tensor,
    block_table_strides: Tensor,
    num_blocks_ptr: Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Copy the rows of the batch's requests, per group; zero the rows that pad the batch."""
    num_groups, num_reqs_padded = grid
    req_idx = batch_idx_to_req_idx[:num_reqs].numpy()
    num_blocks = num_blocks_ptr.numpy()[:, req_idx]
    widths = num_blocks.max(axis=1, initial=0).tolist()
    sources, targets = src_block_table_ptrs.tolist(), dst_block_table_ptrs.tolist()
    strides = block_table_strides.tolist()
    for group in range(num_groups):
        stride, width = strides[group], widths[group]
        source = _int32_at(sources[group], num_blocks_stride * stride).reshape(-1, stride)
        target = _int32_at(targets[group], num_reqs_padded * stride).reshape(-1, stride)
        np.copyto(
            target[:num_reqs, :width],
            source[req_idx, :width],
            where=np.arange(width) < num_blocks[group, :, None],
        )
        target[num_reqs:] = 0


def compute_slot_mappings(
    max_num_tokens: int,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    pos: Tensor,
    block_table_ptrs: Tensor,
    block_table_strides: Tensor,
    block_sizes: Tensor,
    slot_mapping_enabled: Tensor,
    dcp_sharded: Tensor,
    slot_mappings_ptr: Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Turn positions into slots, per group; `PAD_ID` past the tokens and for dummy requests."""
    if CP_SIZE != 1:
        raise NotImplementedError(
            f"context parallel size must be 1 on the CPU, got {CP_SIZE}; leave it out"
        )
    num_reqs = idx_mapping.shape[0]
    starts = query_start_loc.numpy()[: num_reqs + 1]
    begin, end = int(starts[0]), int(starts[-1])
    req_idx = np.repeat(idx_mapping.numpy(), np.diff(starts))
    is_dummy = req_idx < 0
    # a dummy owns no row; row 0 stands in, its slots are overwritten below
    rows = np.where(is_dummy, 0, req_idx)
    num_rows = int(rows.max(initial=0)) + 1
    positions = pos.numpy()[begin:end]
    slots = slot_mappings_ptr.numpy()
    slots[:, end:max_num_tokens] = PAD_ID
    groups = zip(
        slots,
        block_table_ptrs.tolist(),
        block_table_strides.tolist(),
        block_sizes.tolist(),
        slot_mapping_enabled.tolist(),
        strict=True,
    )
    for group_slots, address, stride, block_size, is_enabled in groups:
        if not is_enabled:
            group_slots[begin:end] = PAD_ID
            continue
        table = _int32_at(address, num_rows * stride)
        blocks, offsets = np.divmod(positions, block_size)
        # the kernel never reads a dummy's position either
        blocks[is_dummy] = 0
        slot_ids = table[rows * stride + blocks].astype(np.int64) * block_size + offsets
        group_slots[begin:end] = np.where(is_dummy, PAD_ID, slot_ids)
