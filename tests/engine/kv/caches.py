"""Caches of two layers in one group, as vLLM's objects show them, for tests without an engine."""

import types

import numpy as np
import torch

from tokenprune.engine.kv.cache_layers import cache_layers
from tokenprune.engine.kv.moved_rows import MovedRows
from tokenprune.engine.step import PrunedStep


def cpu_isa(dtype, block_size, head_size):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, block_size, head_size)


def attention_layer(backend, cache, isa="", impl=None):
    """Return what stands in for vLLM's attention layer."""
    named = types.SimpleNamespace(get_name=lambda: backend)
    return types.SimpleNamespace(kv_cache=cache, get_attn_backend=lambda: named, isa=isa, impl=impl)


def named(layers):
    """Return layers by the names vLLM gives them."""
    return {f"model.layers.{i}.attn": layer for i, layer in enumerate(layers)}


def layers_of(attention, table, block_size):
    """Return the cache layers of one group of all `attention` layers."""
    group = types.SimpleNamespace(layer_names=list(attention))
    config = types.SimpleNamespace(kv_cache_groups=[group])
    tables = types.SimpleNamespace(
        block_sizes=[block_size], block_tables=[types.SimpleNamespace(gpu=table)]
    )
    return cache_layers(config, [[0]], attention, tables)


def moved_rows_of(table):
    """Return where rows of one group move to, whose block table is `table`."""
    tables = types.SimpleNamespace(block_tables=[types.SimpleNamespace(gpu=table)])
    return MovedRows(tables, table.device)


def step_of(request, index, before, count, others=()):
    """Return a step of `count` tokens of a request, after one row of each of the `others`."""
    scheduled = [*[1] * len(others), count]
    return PrunedStep(
        [*others, request],
        np.array([*[0] * len(others), index]),
        np.array([*[9] * len(others), before]),
        np.array(scheduled),
        np.concatenate([[0], np.cumsum(scheduled)]),
    )


def rows_of(cache, blocks):
    """Return `[H, slots, 2 * D]` in the order of a request's cache."""
    return cache[blocks.long()].transpose(0, 1).reshape(cache.shape[1], -1, cache.shape[3]).clone()


def random_table(num_blocks, generator):
    return torch.randperm(num_blocks, generator=generator)[None].int()
