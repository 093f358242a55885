"""Reads the queries and keys that a decoder layer would attend with, without running attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine.families.base import DecoderLayer


class _Captured(Exception):
    """Ends a probe as soon as attention is reached."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        super().__init__()
        self.query, self.key = query, key


class QueryKeyProbe:
    """Runs a layer up to its attention.

    The layer's own norm, projections and RoPE run; a hook on its attention stops there.

    Attributes:
        is_running: Whether a probe is running, whose calls of modules are not the model's.
    """

    def __init__(self, layers: list[DecoderLayer]) -> None:
        self.is_running = False
        for layer in layers:
            layer.core.register_forward_pre_hook(self._capture)

    def read(self, layer: DecoderLayer, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return `[HQ, n, D]` queries and `[H, n, D]` keys of a layer, RoPE applied.

        Args:
            layer: The layer.
            inputs: Arguments of its forward by name, of `n` rows; they may be overwritten.
        """
        self.is_running = True
        try:
            # not called as a module: the hooks that drop rows are not meant
            layer.module.forward(**inputs)
            raise AssertionError("attention was not reached")
        except _Captured as captured:
            query, key = captured.query, captured.key
        finally:
            self.is_running = False
        core, rows = layer.core, query.shape[0]
        query = query.view(rows, core.num_heads, core.head_size).transpose(0, 1)
        key = key.view(rows, core.num_kv_heads, core.head_size).transpose(0, 1)
        return query, key

    def _capture(self, core: nn.Module, args: Any) -> None:
        if self.is_running and not torch.compiler.is_compiling():
            raise _Captured(args[0], args[1])
